"""How many files and connections this process may open."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

#: More than all connections that the front accepts, and everything else that a server opens.
ENOUGH = 4096


def allow_enough() -> None:
    """Raise this process's limit of open files, as far as the system lets it; many systems begin with 1024."""
    import resource  # missing on some systems that run the other commands

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < ENOUGH:
        logger.warning(
            "this process may open only %d files, so that few clients could keep others out; let it open %d "
            "(ulimit -Hn, LimitNOFILE, --ulimit nofile)", wanted, ENOUGH
        )  # fmt: skip
