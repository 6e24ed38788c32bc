"""A reward of the tests' own: what the tokens of a reply decide, so that a random model has right and wrong ones."""

from qwq_jax.rl.types import Reply, Score, Task


def even(task: Task, reply: Reply) -> Score:
    """Right where the number of characters is even; half a point more for a task that says so."""
    right = len(reply.text) % 2 == 0
    return Score(float(right) + float(task.judge["answer"]), right, f"{len(reply.text)} characters")
