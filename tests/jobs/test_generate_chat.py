"""`chat`: tokens as they come, a history without thoughts, and the same words piped as typed."""

import io

import numpy as np
import pytest
from rich.console import Console

from qwq_jax.chat import ChatTokenizer, split_thinking
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.engine.step import Draws, StepPlan, StepResult
from qwq_jax.jobs import chat as job
from qwq_jax.jobs.chat import Conversation
from tests.jobs.tiny_checkpoint import CLOSE, END, make_checkpoint

ENGINE = EngineConfig(page_size=32, max_context=128, prefill_chunk=32, compute_dtype="float32", max_sequences=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("chat"))


class Scripted:
    """A runner that says a given text, whatever it is asked; it notes each prompt's tokens."""

    def __init__(self, inner: Engine, reply: list[int]) -> None:
        self.shape = inner.runner.shape
        self.compiles = 0
        self.prompts: list[list[int]] = []
        self._reply = reply
        self._said = 0

    def submit(self, plan: StepPlan) -> StepResult:
        arrays = {name: array[0] for name, array in plan.arrays.items()}
        if plan.program.prefill_tokens:
            begin, end = arrays["prompt_start"][:2]
            if arrays["prompt_position"][begin] == 0:
                self.prompts.append([])
            self.prompts[-1] += arrays["prompt_token"][begin:end].tolist()
            self._said = 1
            return StepResult(self._say(0, (1, 1, 1)), self._say(0, (1, 1)))
        said, self._said = self._said, self._said + int(arrays["budget"][0])
        return StepResult(self._say(said, (1, self._said - said, 1)))

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def _say(self, start: int, extent: tuple[int, ...]) -> Draws:
        """A part of the reply, whose last token is repeated."""
        places = np.arange(start, start + np.prod(extent)).clip(max=len(self._reply) - 1)
        return Draws(np.array(self._reply)[places].reshape(extent), np.zeros(extent))


@pytest.fixture
def scripted(checkpoint: str) -> tuple[Conversation, Scripted, ChatTokenizer]:
    tokenizer = ChatTokenizer.from_directory(checkpoint)
    engine = Engine.from_checkpoint(checkpoint, mesh=MeshConfig(), config=ENGINE)
    reply = [*tokenizer.encode("2+2\n"), CLOSE, *tokenizer.encode("\n\nfour é"), END]
    runner = Scripted(engine, reply)
    conversation = Conversation(Engine(runner, 260, (END,)), tokenizer, SamplingParams(max_tokens=40))
    return conversation, runner, tokenizer


def test_history_holds_answers_without_thoughts(scripted: tuple[Conversation, Scripted, ChatTokenizer]) -> None:
    conversation, runner, tokenizer = scripted
    pieces = list(conversation.ask("hi"))
    assert "".join(text for thinking, text in pieces if thinking) == "2+2"
    assert "".join(text for thinking, text in pieces if not thinking) == "four é"
    assert len(pieces) > 6, "the answer is meant to come in pieces"
    list(conversation.ask("again"))
    assert [tokenizer.decode(prompt) for prompt in runner.prompts] == [
        "[user]hi<think>\n",
        "[user]hi[assistant]four é[user]again<think>\n",
    ]
    conversation.reset()
    list(conversation.ask("new"))
    assert tokenizer.decode(runner.prompts[-1]) == "[user]new<think>\n"


def test_an_answer_stopped_halfway_is_kept_as_far_as_it_came(
    scripted: tuple[Conversation, Scripted, ChatTokenizer],
) -> None:
    conversation, _, _ = scripted
    pieces = conversation.ask("hi")
    while next(pieces) != (False, "f"):
        pass
    pieces.close()
    assert conversation.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "f"}]
    assert not conversation.engine.busy
    thoughts_only = conversation.ask("more")
    next(thoughts_only)
    thoughts_only.close()
    assert len(conversation.messages) == 2


def test_a_message_that_does_not_fit_is_refused_and_forgotten(
    scripted: tuple[Conversation, Scripted, ChatTokenizer],
) -> None:
    conversation, _, _ = scripted
    with pytest.raises(ValueError, match="no room in the context of 128"):
        next(conversation.ask("x" * 200))
    assert not conversation.messages and not conversation.engine.busy


def test_piped_messages_are_answered_in_turn(checkpoint: str) -> None:
    shown = io.StringIO()
    job.chat(
        checkpoint,
        engine=ENGINE,
        mesh=MeshConfig(),
        sampling=GREEDY,
        source=io.StringIO("hello\n\n" + "x" * 200 + "\n/reset\nhello\n/exit\nnever read\n"),
        console=Console(file=shown, soft_wrap=True, highlight=False),
    )
    tokenizer = ChatTokenizer.from_directory(checkpoint)
    engine = Engine.from_checkpoint(checkpoint, mesh=MeshConfig(), config=ENGINE)
    request = Request("r", tuple(tokenizer.apply_template([{"role": "user", "content": "hello"}])), GREEDY)
    (completion,) = engine.generate([request])
    reasoning, content = split_thinking(tokenizer.decode(completion.token_ids), opened=True)
    assert reasoning is not None and not content
    # A console drops control characters, which a random model says too.
    kept = lambda text: [c for c in text if c.isprintable() and not c.isspace()]  # noqa: E731
    answer = kept(reasoning)
    refusal = kept("cannot answer: the prompt has 208 tokens, which leaves no room in the context of 128forgotten")
    assert kept(shown.getvalue()) == answer + refusal + answer


def test_no_checkpoint_is_a_value_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        job.chat(str(tmp_path), engine=ENGINE, mesh=MeshConfig())


@pytest.mark.parametrize("sampling", [{"n": 2}, {"logprobs": True}, {"stop": ("x",)}])
def test_sampling_without_a_meaning_in_a_chat_is_refused(checkpoint, sampling):
    with pytest.raises(ValueError, match="have no meaning in a chat"):
        job.chat(checkpoint, engine=ENGINE, mesh=MeshConfig(), sampling=SamplingParams(**sampling))
