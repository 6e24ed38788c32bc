"""What is asked, as transformers would ask it, and the order of prompts as a function of the seed and a number."""

import logging
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.rl import CurriculumConfig
from qwq_jax.rl.evaluate import JudgedTask, Sample
from qwq_jax.rl.prompts import PromptOrder, make_prompts, measured, select
from qwq_jax.rl.types import Task
from tests.rl.scripted import make_prompt

MODEL = Path(__file__).parents[2] / "qwq_jax" / "embedded" / "tiny-reasoner"
CONVERSATIONS = [
    ({"role": "user", "content": "What is 38 + 4?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 * 3 = ?"}),
    (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\n1 + 1: 2\n</think>\n\nThe answer is \\boxed{2}."},
        {"role": "user", "content": "And <|im_end|> times 7?"},
    ),
]


def make_task(number, messages=CONVERSATIONS[0], difficulty=None):
    return Task(f"t{number}", messages, "sums", {"answer": "42"}, difficulty)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.from_directory(MODEL)


def test_prompts_are_those_of_the_template(tokenizer):
    theirs = AutoTokenizer.from_pretrained(MODEL)
    tasks = [make_task(i, messages) for i, messages in enumerate(CONVERSATIONS)]
    prompts = make_prompts(tasks, tokenizer, longest=500)
    assert [prompt.task for prompt in prompts] == tasks
    for prompt, messages in zip(prompts, CONVERSATIONS, strict=True):
        ids = theirs.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        assert list(prompt.token_ids) == ids
        assert theirs.bos_token_id is None or prompt.token_ids.count(theirs.bos_token_id) <= 1
        assert theirs.decode(ids).endswith("<|im_start|>assistant\n<think>\n"), "up to where the reply begins"


def test_prompts_that_are_too_long_are_left_out_and_counted(tokenizer, caplog):
    tasks = [make_task(i, messages) for i, messages in enumerate(CONVERSATIONS)]
    lengths = [len(prompt.token_ids) for prompt in make_prompts(tasks, tokenizer, longest=500)]
    assert len(set(lengths)) == 3
    with caplog.at_level(logging.INFO):
        kept = make_prompts(tasks, tokenizer, longest=max(lengths) - 1)
    assert len(kept) == 2 and "1 of 3 tasks are left out: prompts of over" in caplog.text
    assert len(make_prompts(tasks, tokenizer, longest=max(lengths))) == 3, "at most, not less than"
    with pytest.raises(ValueError, match=r"^none of 3 tasks has a prompt of at most 3 tokens \(max_prompt_tokens\)$"):
        make_prompts(tasks, tokenizer, longest=3)


def test_a_conversation_that_cannot_be_rendered_names_its_task(tokenizer):
    bad = make_task(7, ({"role": "wizard", "content": "?"},))
    with pytest.raises(ValueError, match="^task t7: .*wizard"):
        make_prompts([make_task(1), bad], tokenizer, longest=500)


def test_difficulties_are_chosen_and_tasks_without_one_stay():
    tasks = [make_task(i, difficulty=d) for i, d in enumerate((None, 0.0, 0.5, 0.75, 1.0))]
    chosen = select(tasks, CurriculumConfig(least_difficulty=0.5, most_difficulty=0.75))
    assert [task.task_id for task in chosen] == ["t0", "t2", "t3"]
    assert select(tasks, CurriculumConfig()) == tasks


def test_an_evaluation_says_how_difficult_tasks_are():
    def judged(name, *right):
        return JudgedTask(name, "s", tuple(Sample(0.0, each) for each in right))

    tasks = [make_task(i) for i in range(3)]
    found = [judged("t2", False, False), judged("t0", True, True, True, False), judged("t1", True, None)]
    with_difficulty = measured(tasks, [*found, judged("t9", True)])
    assert [task.difficulty for task in with_difficulty] == [0.25, 0.0, 1.0]
    teaching = select(with_difficulty, CurriculumConfig(least_difficulty=0.05, most_difficulty=0.95))
    assert [task.task_id for task in teaching] == ["t0"]
    for missing in (found[1:], [*found[1:], judged("t2", None)]):
        with pytest.raises(ValueError, match="^curriculum.evaluation: task t2 was not judged right or wrong there$"):
            measured(tasks, missing)


def test_a_curriculum_that_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match="^curriculum: no task has a difficulty from 0.6 to 1$"):
        select([make_task(0, difficulty=0.5)], CurriculumConfig(least_difficulty=0.6))
    with pytest.raises(ValueError, match="easy_first needs a difficulty for each task, and t1 has none$"):
        select([make_task(0, difficulty=0.5), make_task(1)], CurriculumConfig(order="easy_first"))


def numbers(order, start, count):
    return [int(order[i].task.task_id[1:]) for i in range(start, start + count)]


def test_every_pass_has_every_prompt_once_in_another_order():
    prompts = [make_prompt(i) for i in range(20)]
    order = PromptOrder(prompts, seed=3)
    passes = [numbers(order, 20 * turn, 20) for turn in range(4)]
    assert all(sorted(each) == list(range(20)) for each in passes)
    assert len({tuple(each) for each in [*passes, list(range(20))]}) == 5
    assert numbers(PromptOrder(prompts, seed=4), 0, 20) not in passes


def test_a_prompt_depends_on_the_seed_and_its_number_only():
    """So a run that goes on at a cursor, mid-pass, gets what it would have got."""
    prompts = [make_prompt(i) for i in range(7)]
    whole = numbers(PromptOrder(prompts, seed=1), 0, 40)
    assert numbers(PromptOrder(prompts, seed=1), 17, 10) == whole[17:27]
    backwards = PromptOrder(prompts, seed=1)
    assert [numbers(backwards, i, 1)[0] for i in reversed(range(40))] == whole[::-1]


def test_easy_ones_come_first_in_every_pass_and_equals_are_shuffled():
    difficulty = [0.5, 0.0, 1.0, 0.5, 0.0, 0.5, 0.5, 0.0]
    prompts = [make_prompt(i, difficulty=d) for i, d in enumerate(difficulty)]
    order = PromptOrder(prompts, seed=0, easy_first=True)
    passes = [numbers(order, 8 * turn, 8) for turn in range(6)]
    for each in passes:
        assert sorted(each) == list(range(8))
        assert all(difficulty[left] <= difficulty[right] for left, right in pairwise(each))
    assert len({tuple(each) for each in passes}) > 3
    # A batch that spans two passes, and one that comes back to the first.
    assert numbers(order, 5, 6) == [*passes[0][5:], *passes[1][:3]]
    assert numbers(order, 0, 8) == passes[0]
