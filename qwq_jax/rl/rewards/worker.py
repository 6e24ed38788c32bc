"""What runs in a worker process of `RewardPool`: it makes the rewards, then scores what it is sent."""

import os
import resource
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection

from qwq_jax.config.rewards import VerifierConfig
from qwq_jax.rl.rewards.inside.supervisor import die_with_parent
from qwq_jax.rl.rewards.reward import make_reward
from qwq_jax.rl.types import Reply, Task


@dataclass(frozen=True)
class Start:
    """The first message to a worker; it answers `Ready` or `Refused`.

    Attributes:
        configs: Its rewards.
        memory_bytes: Address space that they may take.
    """

    configs: tuple[VerifierConfig, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Ask:
    """What to score, with the reward of this index; the answer is a `Score` or, before the worker ends, `Refused`."""

    index: int
    task: Task
    reply: Reply


@dataclass(frozen=True)
class Ready:
    """The rewards are made."""


@dataclass(frozen=True)
class Refused:
    """What was raised; `by_user` says that it is a ValueError, which the user can do something about."""

    text: str
    by_user: bool


def run(fd: int, parent: int) -> None:
    """Serves the socket `fd` until the other side closes it.

    Args:
        fd: An open socket, inherited.
        parent: Process id of who started this process, and with whom it ends.
    """
    die_with_parent(parent)
    os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pool
    connection = Connection(fd)
    try:
        start: Start = connection.recv()
        resource.setrlimit(resource.RLIMIT_AS, (start.memory_bytes, start.memory_bytes))
        rewards = [make_reward(config) for config in start.configs]
        connection.send(Ready())
        while True:
            ask: Ask = connection.recv()
            connection.send(rewards[ask.index].score(ask.task, ask.reply))
    except EOFError:
        return
    except BaseException as error:
        connection.send(Refused(f"{type(error).__name__}: {error}"[:500], isinstance(error, ValueError)))
        # Quietly: whoever asked has the text, and starts another.
        raise SystemExit(1) from error
