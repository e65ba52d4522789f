"""The label sets of the published models, and other facts that their dataset determines.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 4.1, in the order of the released program.
"""

from __future__ import annotations

MUG = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")

MHAD = (
    "right arm swipe to the left",
    "right arm swipe to the right",
    "right hand wave",
    "two hand front clap",
    "right arm throw",
    "cross arms in the chest",
    "basketball shooting",
    "draw x",
    "draw circle clockwise",
    "draw circle counter clockwise",
    "draw triangle",
    "right hand bowling",
    "front boxing",
    "baseball swing from right",
    "tennis forehand swing",
    "two arms curl",
    "tennis serve",
    "two hand push",
    "knock on door",
    "hand catch",
    "pick up and throw",
    "jogging",
    "walking",
    "stand to sit",
    "forward lunge (left foot forward)",
    "squat",
)

NATOPS = (
    "I Have Command",
    "All Clear",
    "Not Clear",
    "Spread Wings",
    "Fold Wings",
    "Lock Wings",
    "Up Hook",
    "Down Hook",
    "Remove Tiedowns",
    "Remove Chocks",
    "Insert Chocks",
    "Move Ahead",
    "Turn Left",
    "Turn Right",
    "Next Marshaller",
    "Slow Down",
    "Stop",
    "Nosegear Steering",
    "Hot Brakes",
    "Brakes On",
    "Brakes Off",
    "Install Tiedowns",
    "Fire",
    "Cut Engine",
)

#: Labels by dataset, exactly as given to the text encoder.
DATASETS: dict[str, tuple[str, ...]] = {"mug": MUG, "mhad": MHAD, "natops": NATOPS}

#: Padding of the region predictor's last conv by dataset, which weights do not show.
REGION_PAD: dict[str, int] = {"mug": 3, "mhad": 0, "natops": 0}
