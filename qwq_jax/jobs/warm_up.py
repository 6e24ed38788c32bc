"""`qwq-jax warm-up`: compile what an engine needs, so that the next start finds it in the compile cache."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwq_jax import runtime
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.engine.engine import Engine

_log = logging.getLogger(__name__)


def warm_up(checkpoint: str, *, engine: EngineConfig, mesh: MeshConfig) -> None:
    """Compiles the usual programs of an engine into the persistent compile cache.

    Args:
        checkpoint: Directory, local or ``gs://``.
        engine: Sizes of the engine; another engine, mesh or kind of device needs other programs.
        mesh: Devices.

    Raises:
        ValueError: The checkpoint cannot be used.
    """
    compile_programs(Engine.from_checkpoint(checkpoint, mesh=mesh, config=engine))


def compile_programs(engine: Engine) -> None:
    """Compiles the usual programs of an engine, shows how far it has come, and says how long it took.

    Those that the cache holds are read from there, which takes a moment.
    """
    started = time.monotonic()
    bar = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("programs ·"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None)
        count = engine.warm_up(lambda done, total: bar.update(task, completed=done, total=total))
    seconds = time.monotonic() - started
    _log.info("%d programs ready in %.1f s; compile cache: %s", count, seconds, runtime.compile_cache() or "none")
