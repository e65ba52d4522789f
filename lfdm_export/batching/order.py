"""Which jobs take the next step. Plain arithmetic, no arrays.

Policy "step", the product's: at each step the jobs that are due first have the slots. A job is due at

    min(deadline, submitted + STRETCH x seconds that its steps take alone) - PRIORITY_SECONDS x priority

so that short jobs pass long ones, deadlines are met in their order, and a higher priority goes first. Time goes on and
what is due stays: a job waits for those that were there before it and for those submitted before it is due, never for
later ones of its priority; a level of priority passes what is due up to PRIORITY_SECONDS earlier, and nothing older. So
nothing starves. A job whose slot goes to a more urgent one is paused: it keeps its state and goes on later.

Policies "clip" (one at a time), "dynamic" and "dynamic-shrink" (whole clips batched by arrival; none joins or leaves a
batch that runs, and all are answered when its longest is done) are here to be compared with; they know no priorities,
and stop nothing that has begun. With "dynamic" a batch keeps its size to the end, as a loop over one tensor does; with
"dynamic-shrink" those that have their steps cost nothing more.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from lfdm_export.batching.live_job import LiveJob

Policy = Literal["step", "clip", "dynamic", "dynamic-shrink"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
#: How many times the seconds of its own steps a job may take before later ones no longer pass it. In simulated queues
#: (Poisson arrivals at 0.7 and 0.9 of what one slot can do, 3 to 20 and 5 to 50 steps) 3 takes 17 to 33% off the median
#: latency of arrival order, and leaves its 99th percentile within 10%; with deadlines of 1 to 10 mean clips 90 to 93.5%
#: are met (arrival order 85 to 90%). 2 meets fewer deadlines, 4 has up to 20% at the 99th percentile.
STRETCH = 3.0
#: Seconds of waiting that a level of priority is worth.
PRIORITY_SECONDS = 10.0
#: How long a whole-clip policy lets a batch fill up, in seconds.
BATCH_DELAY = 0.05


def due_time(live: LiveJob, pace: float) -> float:
    """When a job is due; see the module.

    Args:
        live: the job.
        pace: seconds that a step takes alone; 0 if unknown, which makes the order that of arrival.
    """
    job = live.job
    due = live.submitted + STRETCH * pace * job.table.steps
    return (due if job.deadline is None else min(due, job.deadline)) - PRIORITY_SECONDS * job.priority


def choose(
    policy: Policy, live: Sequence[LiveJob], slots: int, now: float, pace: Mapping[bool, float]
) -> list[LiveJob]:
    """The jobs that take the next step, at most `slots`; none if a batch is still to fill up.

    Args:
        policy: see the module.
        live: jobs that wait, are paused, or run; by arrival.
        slots: samples in one step at most.
        now: the time.
        pace: seconds that a step takes alone, by whether it is guided; 0 if unknown.
    """
    if policy == "step":
        known = {guided: pace[guided] or pace[not guided] for guided in pace}
        return heapq.nsmallest(slots, live, key=lambda job: (due_time(job, known[job.job.guided]), job.number))
    running = [job for job in live if job.joined is not None]
    if running:
        return running
    if policy == "clip":
        return list(live[:1])
    full = len(live) >= slots or (live and now >= live[0].submitted + BATCH_DELAY)
    return list(live[:slots]) if full else []
