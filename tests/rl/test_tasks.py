"""Tasks from files, arithmetic and reasoning-gym, and what is said of those that are none."""

import json

import pytest
import reasoning_gym

from qwq_jax.config.tasks import ArithmeticTasks, FileTasks, GymTasks, parse_source
from qwq_jax.rl.rewards.arithmetic import Split, is_correct, problems, split_of
from qwq_jax.rl.tasks import arithmetic_tasks, gym_tasks, load_tasks, read_tasks
from qwq_jax.rl.types import Task

GOOD = {"id": "a", "prompt": "What is 6 x 7?", "answer": "42"}


def write(tmp_path, *lines):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_is_read_in_order_with_all_that_rewards_need(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sort."}]
    tests, rules = [{"input": "2 1", "output": "1 2"}], [{"kind": "words", "least": 3}]
    line = {"id": "b", "messages": messages, "source": "code", "tests": tests, "instructions": rules, "difficulty": 1}
    several = {"id": "c", "prompt": "x", "answer": ["yes", 1]}
    assert read_tasks(write(tmp_path, "\ufeff" + json.dumps(GOOD), "", line, several)) == [
        Task("a", ({"role": "user", "content": "What is 6 x 7?"},), "", {"answer": "42"}),
        Task("b", tuple(messages), "code", {"tests": tests, "instructions": rules}, 1.0),
        Task("c", ({"role": "user", "content": "x"},), "", {"answer": ["yes", 1]}),
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "tasks.jsonl:2: expected a JSON object, but at column 2"),
        ("[1]", r"tasks.jsonl:2: expected a JSON object, got \[1\]"),
        ('{"id": "b", "id": "c", "prompt": "x"}', "tasks.jsonl:2: id: given twice"),
        ({"id": "b", "prompt": "x", "answr": "4"}, "tasks.jsonl:2: answr: unknown key, did you mean answer?"),
        (GOOD, "tasks.jsonl:2: id 'a' is taken by line 1"),
        ({"prompt": "x"}, "tasks.jsonl:2: id: missing"),
        ({"id": 3, "prompt": "x"}, "tasks.jsonl:2: id: expected a valid string, got 3"),
        ({"id": "", "prompt": "x"}, "tasks.jsonl:2: id: "),
        ({"id": "b"}, "tasks.jsonl:2: expected one of messages and prompt, got none"),
        ({"id": "b", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages and prompt, got both"),
        ({"id": "b", "prompt": "x", "answer": True}, "tasks.jsonl:2: answer: expected a text, a number or .* got true"),
        ({"id": "b", "prompt": "x", "answer": {"is": 4}}, "tasks.jsonl:2: answer: expected a text"),
        ({"id": "b", "prompt": "x", "answer": " "}, "tasks.jsonl:2: answer: expected a text"),
        ({"id": "b", "prompt": "x", "answer": ["4", ""]}, "tasks.jsonl:2: answer: expected .* none of them empty"),
        ({"id": "b", "prompt": "x", "answer": []}, "tasks.jsonl:2: answer: expected a text"),
        ({"id": "b", "prompt": "x", "tests": 3}, "tasks.jsonl:2: tests: expected a test or a list of tests, got 3"),
        ({"id": "b", "prompt": "x", "tests": []}, r"tasks.jsonl:2: tests: expected a test or .* got \[\]"),
        ({"id": "b", "prompt": "x", "difficulty": 2}, "tasks.jsonl:2: difficulty: .* less than or equal to 1"),
        ({"id": "b", "prompt": "x", "difficulty": True}, "tasks.jsonl:2: difficulty"),
        ({"id": "b", "messages": []}, "tasks.jsonl:2: messages"),
        ({"id": "b", "messages": ["hi"]}, "tasks.jsonl:2: messages.0: expected a valid dictionary, got 'hi'"),
        ({"id": "b", "messages": [{"role": "bot", "content": "x"}]}, r"2: messages\[0\]: unknown role 'bot'"),
        ({"id": "b", "messages": [{"role": "user"}]}, r"2: messages\[0\]: content is missing"),
        (
            {"id": "b", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "2: messages: the conversation ends with role 'assistant', so that there is nothing to reply to",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        read_tasks(write(tmp_path, GOOD, line))


def test_a_file_without_tasks_is_named(tmp_path):
    with pytest.raises(ValueError, match="tasks.jsonl: no task in it"):
        read_tasks(write(tmp_path, "", ""))
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        read_tasks(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="is not a file"):
        read_tasks(tmp_path)


def test_arithmetic_is_what_the_generator_writes_and_keeps_the_splits_apart():
    source = ArithmeticTasks(split="held-out", levels=(1, 3), count=300, seed=5)
    tasks = arithmetic_tasks(source)
    assert tasks == arithmetic_tasks(source) and len({task.task_id for task in tasks}) == 300
    asked = {problem.question: problem for problem in _some(problems(5, split=Split.HELD_OUT, levels=(1, 3)), 2000)}
    expressions = set()
    for task in tasks:
        (message,) = task.messages
        problem = asked[message["content"]]
        assert message["role"] == "user" and task.source == f"arithmetic-{problem.level}"
        assert is_correct(f"</think>\\boxed{{{task.judge['answer']}}}", problem.answer)
        assert task.difficulty == pytest.approx((problem.level - 1) / 3)
        assert split_of(problem.expression) is Split.HELD_OUT
        expressions.add(problem.expression)
    assert len(expressions) == 300, "each expression once"
    train = arithmetic_tasks(source.model_copy(update={"split": "train"}))
    assert not {task.messages[0]["content"] for task in train} & {task.messages[0]["content"] for task in tasks}
    assert arithmetic_tasks(source.model_copy(update={"seed": 6})) != tasks


def _some(stream, count):
    return [next(stream) for _ in range(count)]


def test_more_held_out_problems_than_there_are_is_said(monkeypatch):
    monkeypatch.setattr("qwq_jax.rl.tasks._PATIENCE", 30)
    with pytest.raises(ValueError, match=r"count 5000 is more than the held-out problems of levels \[1\]"):
        arithmetic_tasks(ArithmeticTasks(split="held-out", levels=(1,), count=5000))


def test_reasoning_gym_scores_what_it_made():
    tasks = gym_tasks(GymTasks(dataset="leg_counting", count=4, seed=3, settings={"max_animals": 4}))
    assert len({task.task_id for task in tasks}) == 4
    for task, entry in zip(
        tasks, reasoning_gym.create_dataset("leg_counting", size=4, seed=3, max_animals=4), strict=True
    ):
        assert task.messages == ({"role": "user", "content": entry["question"]},)
        judged = task.judge["entry"]
        score = reasoning_gym.get_score_answer_fn(judged["metadata"]["source_dataset"])
        assert score(task.judge["answer"], judged) == 1.0 and score("-1", judged) < 1.0
    json.dumps([task.judge for task in tasks])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (GymTasks(dataset="leg_count"), "dataset 'leg_count': Dataset 'leg_count' not registered"),
        (GymTasks(dataset="leg_counting", settings={"legs": 3}), "dataset 'leg_counting': .*'legs'"),
        (GymTasks(dataset="leg_counting", settings={"min_animals": 0}), "dataset 'leg_counting': min_animals must be"),
    ],
)
def test_a_wrong_dataset_is_named(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        gym_tasks(source)


def test_sources_are_joined_and_share_no_name(tmp_path):
    file = FileTasks(path=str(write(tmp_path, GOOD)))
    tasks = load_tasks([ArithmeticTasks(count=2), file])
    assert [task.task_id for task in tasks] == ["arithmetic/train/0/0", "arithmetic/train/0/1", "a"]
    with pytest.raises(ValueError, match="task id 'a' comes from two sources"):
        load_tasks([file, file])


def test_sources_of_the_command_line():
    assert parse_source("a:b/tasks.jsonl") == FileTasks(path="a:b/tasks.jsonl")
    assert parse_source("arithmetic") == ArithmeticTasks()
    assert parse_source("arithmetic:split=held-out,levels=[1,2],count=64,word_share=0") == ArithmeticTasks(
        split="held-out", levels=(1, 2), count=64, word_share=0.0
    )
    assert parse_source("reasoning_gym:dataset=leg_counting,seed=2,max_animals=4") == GymTasks(
        dataset="leg_counting", seed=2, settings={"max_animals": 4}
    )
    with pytest.raises(ValueError, match="^arithmetic:level=3: level: unknown key, did you mean levels?"):
        parse_source("arithmetic:level=3")
    with pytest.raises(ValueError, match="expected arithmetic:KEY=VALUE,KEY=VALUE, got 'held-out'"):
        parse_source("arithmetic:held-out")
