"""Commands: each parses its arguments, calls the library, prints, and returns the exit status.

0: done; 1: an error, printed in one line; 2: wrong usage; 3: the export differs from its reference by more than
its tolerance; 130: interrupted (128 plus the number of the signal that ended it: also 143, 129).
"""

import signal
import threading

from lfdm_export.machine import limit_math_threads

# Ctrl-C while modules load ends the process without a traceback.
_loading = threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _loading:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

limit_math_threads()  # must precede the imports below: NumPy's and PyTorch's libraries set their threads on load

from lfdm_export.cli.export import export_main  # noqa: E402
from lfdm_export.cli.generate import generate_main  # noqa: E402
from lfdm_export.cli.info import info_main  # noqa: E402
from lfdm_export.cli.serve import serve_main  # noqa: E402
from lfdm_export.cli.train import train_main  # noqa: E402
from lfdm_export.cli.verify import verify_main  # noqa: E402
from lfdm_export.cli.web import web_main  # noqa: E402

if _loading:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["export_main", "generate_main", "info_main", "serve_main", "train_main", "verify_main", "web_main"]
