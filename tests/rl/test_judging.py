"""Rewards of several processes put together, and reward models beside those of worker processes."""

import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.rewards import ExactConfig, FormatConfig, RewardModelConfig
from qwq_jax.engine.request import Completion, FinishReason
from qwq_jax.rl import judging
from qwq_jax.rl.judging import SharedJudge, exchange
from qwq_jax.rl.prompts import Prompt
from qwq_jax.rl.replies import reply_of
from qwq_jax.rl.rewards.graded import Graded, add_up
from qwq_jax.rl.types import Reply, Score, Task
from tests.rl.scripted import make_completion, make_prompt

MODEL = Path(__file__).parents[2] / "qwq_jax" / "embedded" / "tiny-reasoner"
EXACT = (ExactConfig(),)
REPLY = Reply("a", None, "a", 2)


class Pool:
    """Scores at once: the length of the text, right if it is "a"; keeps what it was asked."""

    def __init__(self, configs=EXACT):
        self.configs = configs
        self.asked = []

    def submit(self, task, reply):
        self.asked.append((task.task_id, reply.text))
        future = Future()
        parts = {"exact": Score(float(len(reply.text)), reply.text == "a", f"é {reply.text}")}
        future.set_result(add_up(self.configs, task, parts))
        return future


class Host:
    """Some processes in one: each runs in a thread, and gathers what all of them bring."""

    def __init__(self, count, monkeypatch):
        self.count = count
        self._index = threading.local()
        self._barrier = threading.Barrier(count)
        self._brought = [None] * count
        monkeypatch.setattr(judging.jax, "process_count", lambda: count)
        monkeypatch.setattr(judging.jax, "process_index", lambda: self._index.value)
        monkeypatch.setattr(judging.multihost_utils, "process_allgather", self._gather)

    def _gather(self, array):
        self._brought[self._index.value] = np.asarray(array)
        self._barrier.wait()
        gathered = np.stack(self._brought)
        self._barrier.wait()
        return gathered

    def run(self, function):
        results = [None] * self.count

        def work(index):
            self._index.value = index
            results[index] = function(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results


GRADED = [
    Graded(0.1 + 0.2, True, {"exact": Score(1 / 3, True, "ünïcode \\boxed{1} 思"), "length": Score(-0.5)}),
    Graded(-1e-300, None),
    Graded(0.0, False, {"exact": Score(0.0, False)}, failed=("exact",), missing=("model",)),
    Graded(1e6, True, {"exact": Score(1.0, True, "x" * 3000)}),
    Graded(0.7, None, {}),
]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_bring_their_parts_together(count, monkeypatch):
    """Exactly: a reward that is rounded on the way would differ between processes."""
    host = Host(count, monkeypatch)
    brought = [[graded if i % count == rank else None for i, graded in enumerate(GRADED)] for rank in range(count)]
    for found in host.run(lambda rank: exchange(brought[rank])):
        assert found == GRADED


def test_one_process_has_nothing_to_exchange():
    assert exchange(GRADED) == GRADED
    with pytest.raises(AssertionError):
        exchange([GRADED[0], None])


def ask(judge, texts):
    claims = []
    for number, text in enumerate(texts):
        reply = Reply(text, None, text, len(text))
        claims.append(judge.submit(make_prompt(number), make_completion([5, 2]), reply))
    return judge.results(claims)


def test_every_process_judges_its_share_and_knows_all(monkeypatch):
    texts = ["a", "bb", "ccc", "a", "eeeee"]
    host, pools = Host(2, monkeypatch), [Pool(), Pool()]

    def twice(rank):
        judge = SharedJudge(pools[rank].configs, pools[rank], {}, tokenizer=None)
        return ask(judge, texts), ask(judge, texts[:2])

    found = host.run(twice)
    for first, second in found:
        assert [graded.value for graded in first] == [1, 2, 3, 1, 5]
        assert [graded.correct for graded in first] == [True, False, False, True, False]
        assert [graded.value for graded in second] == [1, 2]
    # Each was judged once, by one of the two; five are not divided in the same way twice.
    assert sorted([*pools[0].asked, *pools[1].asked]) == sorted(
        [(f"t{i}", text) for i, text in enumerate(texts)] + [(f"t{i}", text) for i, text in enumerate(texts[:2])]
    )
    assert len(pools[0].asked) == 4 and len(pools[1].asked) == 3


def test_alone_it_judges_everything():
    pool = Pool()
    graded = ask(SharedJudge(pool.configs, pool, {}, tokenizer=None), ["a", "bb"])
    assert [each.value for each in graded] == [1, 2] and len(pool.asked) == 2


class Scorer:
    """A reward model that says how many tokens it read, and notes which."""

    def __init__(self):
        self.read = []

    def scores(self, pairs):
        self.read += [(list(prompt), list(reply)) for prompt, reply in pairs]
        return np.array([len(reply) for _, reply in pairs], np.float32)


def test_reward_models_are_added_to_what_workers_said():
    model = RewardModelConfig(checkpoint="x", weight=0.5, clip=3.0)
    elsewhere = RewardModelConfig(checkpoint="y", name="other", sources=("essays",))
    pool, scorer, idle = Pool((ExactConfig(), model, elsewhere)), Scorer(), Scorer()
    judge = SharedJudge(pool.configs, pool, {"model": scorer, "other": idle}, ChatTokenizer.from_directory(MODEL))
    prompt = make_prompt(0)
    claims = [judge.submit(prompt, make_completion(tokens), REPLY) for tokens in ([5, 6, 2], [5, 6, 7, 8, 2])]
    graded = judge.results(claims)
    assert [each.value for each in graded] == [1 + 0.5 * 3, 1 + 0.5 * 3], "the second is cut to 3"
    assert [each.parts["model"].value for each in graded] == [3.0, 3.0]
    assert all(each.correct for each in graded) and not any(each.missing for each in graded)
    assert scorer.read == [([65, 66], [5, 6, 2]), ([65, 66], [5, 6, 7, 8, 2])]
    assert idle.read == [], "it judges another source"


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer.from_directory(MODEL)


@pytest.mark.parametrize(
    ("thoughts", "text", "ended", "expected"),
    [
        (True, "3+4=7\n</think>\n\nIt is 7.", True, "3+4=7\n</think>\n\nIt is 7.<|im_end|>"),
        (False, "3+4=7\n</think>\n\nIt is 7.", True, "\n</think>\n\nIt is 7.<|im_end|>"),
        (False, "3+4=7\n</think>\n\nIt is", False, "\n</think>\n\nIt is"),
        (False, "3+4 and on and on", False, "3+4 and on and on"),
    ],
)
def test_a_reward_model_reads_the_answer_or_all_of_it(tokenizer, thoughts, text, ended, expected):
    messages = ({"role": "user", "content": "3+4?"},)
    prompt = Prompt(Task("1", messages, judge={"answer": "7"}), tuple(tokenizer.apply_template(messages)))
    tokens = tokenizer.encode(text)
    end = tokenizer.special_ids["<|im_end|>"]
    completion = Completion(
        "1", 0, (*tokens, *([end] if ended else ())), FinishReason.STOP, stop_token_id=end if ended else None
    )
    config = RewardModelConfig(checkpoint="x", thoughts=thoughts)
    scorer, pool = Scorer(), Pool((FormatConfig(name="exact"), config))
    judge = SharedJudge(pool.configs, pool, {"model": scorer}, tokenizer)
    judge.results([judge.submit(prompt, completion, reply_of(completion, prompt.token_ids, tokenizer))])
    ((read_prompt, read),) = scorer.read
    assert read_prompt == list(prompt.token_ids)
    assert tokenizer.decode(read, skip_special_tokens=False) == expected
    if thoughts:
        assert read == list(completion.token_ids), "what was drawn is not tokenised again"
