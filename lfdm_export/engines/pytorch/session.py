"""What the engines of one bundle share: device, modules, compiled programs, and a lock."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import TORCH_WEIGHTS, Bundle
from lfdm_export.engines.compiled_cache import user_compiled_cache
from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.pytorch.compiled import Program, make_program
from lfdm_export.engines.pytorch.target import PYTORCH
from lfdm_export.engines.pytorch.weights import load_modules
from lfdm_export.errors import EngineError
from lfdm_export.machine import engine_threads
from lfdm_export.rewrite.precision import channels_last

# Algorithms that cuDNN tries per new convolution: 10 by default, of some 30 ms each.
_TRIED_ALGORITHMS = 4
# Runs before a capture: libraries load kernels and choose algorithms, which cannot be captured.
_WARM_UP = 3


class TorchSession:
    """The modules of a bundle on a device. Any thread may use it; `owned` admits one at a time.

    Attributes:
        manifest: manifest of the bundle.
        device: the first GPU that PyTorch sees, else the CPU.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, modules: dict[str, nn.Module] | None = None):
        """Load the modules, without compiling them.

        Args:
            bundle: a bundle exported for the target torch.
            threads: threads per run on a CPU; None uses every core that this process may use.
            modules: by stage, in the precision of the bundle and on `find_device`; None loads those of the bundle.

        Raises:
            EngineError: the bundle has no weights for PyTorch, or there is a GPU but this PyTorch has no CUDA.
        """
        self.manifest: Manifest = bundle.manifest
        self.device = find_device()
        self._threads = engine_threads(threads)
        self._modules = load_modules(bundle, self.device) if modules is None else modules
        channels_last(self._modules)
        self._identity = {"weights": str(bundle.manifest.files.get(TORCH_WEIGHTS)), "precision": self.precision}
        self._lock = threading.RLock()
        self._programs: dict[tuple[object, ...], Program] = {}
        self.stream = torch.cuda.Stream(self.device) if self.on_gpu else None

    @property
    def precision(self) -> str:
        """The precision of the bundle."""
        return self.manifest.precision

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Reserve the session for this thread, with its stream and the PyTorch settings of its precision."""
        with self._lock, torch.no_grad(), contextlib.ExitStack() as context:
            if not self.on_gpu:
                before = torch.get_num_threads()
                torch.set_num_threads(self._threads)
                context.callback(torch.set_num_threads, before)
                yield
                return
            tf32 = self.precision == "tf32"
            for holder, name, value in (
                (torch.backends.cudnn, "benchmark", True),
                (torch.backends.cudnn, "benchmark_limit", _TRIED_ALGORITHMS),
                (torch.backends.cudnn, "allow_tf32", tf32),
                (torch.backends.cuda.matmul, "allow_tf32", tf32),
            ):
                context.callback(setattr, holder, name, getattr(holder, name))
                setattr(holder, name, value)
            context.enter_context(torch.cuda.device(self.device))
            context.enter_context(torch.cuda.stream(self.stream))
            yield

    def module(self, stage: str) -> nn.Module:
        """The module of a stage.

        Raises:
            EngineError: the bundle was exported without it.
        """
        if stage not in self._modules:
            raise EngineError(f"the bundle has no weights of the stage {stage!r} for PyTorch; export it again")
        return self._modules[stage]

    def program(self, name: str, module: nn.Module, examples: Sequence[Tensor]) -> Program:
        """The compiled program of a module for inputs like the examples; call it while the session is owned.

        Raises:
            EngineError: PyTorch cannot compile the module here.
        """
        key = (name, *((tensor.dtype, tuple(tensor.shape)) for tensor in examples))
        if key not in self._programs:
            cache = user_compiled_cache(PYTORCH.name)
            self._programs[key] = make_program(module, examples, name=name, identity=self._identity, cache=cache)
        return self._programs[key]

    def captured(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Prepare work on tensors with fixed addresses, on a GPU as a CUDA graph; call it while the session is owned.

        Returns:
            A function that does the work, and its results, which every call overwrites in place.
        """
        if not self.on_gpu:
            places = run()
            return lambda: _write(places, run()), places
        for _ in range(_WARM_UP):
            run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            results = run()
        return graph.replay, results


def _write(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def find_device() -> torch.device:
    """The device of the target torch: the first visible GPU, else the CPU.

    Raises:
        EngineError: there is a GPU, but this PyTorch cannot use it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    gpus, _ = find_gpus()
    if gpus:
        raise EngineError(
            f"there is a GPU, {gpus[0].name}, but PyTorch {torch.__version__} cannot use it: install a PyTorch built "
            "for CUDA, or hide the GPU with CUDA_VISIBLE_DEVICES= (empty), which runs it on the CPU"
        )
    return torch.device("cpu")


_SESSIONS: weakref.WeakKeyDictionary[Bundle, dict[int | None, TorchSession]] = weakref.WeakKeyDictionary()
_SESSIONS_LOCK = threading.Lock()


def torch_session(bundle: Bundle, *, threads: int | None = None) -> TorchSession:
    """The session of an open bundle, created on first use."""
    with _SESSIONS_LOCK:
        sessions = _SESSIONS.setdefault(bundle, {})
        if threads not in sessions:
            sessions[threads] = TorchSession(bundle, threads=threads)
        return sessions[threads]
