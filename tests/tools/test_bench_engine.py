"""The benchmark of the engine runs, tells what it measured, and notices tokens that transformers would not choose."""

import pytest
import torch

from tools.bench_engine import Runner, Workload, disagreements, load_peer, make_workload, measure, parse, report

TINY = (
    "--tiny --layers 1 --requests 3 --rows 2 --batches 2 --prompt 40 --longest 6 --stream 4 --repetitions 1 --no-start"
).split()


def test_workload_is_seeded_ragged_and_capped():
    work = make_workload(200, 512, longest=100)
    assert work == make_workload(200, 512, longest=100)
    assert len({len(prompt) for prompt in work.prompts}) > 90
    assert max(work.lengths) == 100 and 50 < sorted(work.lengths)[100] < 80
    assert work.tokens == sum(work.lengths)


def test_a_turn_has_prompts_that_share_no_beginning_with_another():
    work = make_workload(50, 512)
    turns = [work, work.renewed(1, 512), work.renewed(2, 512)]
    assert all(turn.lengths == work.lengths for turn in turns)
    assert all([len(p) for p in turn.prompts] == [len(p) for p in work.prompts] for turn in turns)
    assert all(len({turn.prompts[i][0] for turn in turns}) == 3 for i in range(50))
    assert all(0 < token < 512 for turn in turns for prompt in turn.prompts for token in prompt)


def test_report_compares_the_best_with_the_best_peer():
    def runner(name, tokens, seconds, foresees=False):
        return Runner(name, lambda work: None, Workload([[1]], [tokens]), foresees, seconds)

    runners = [runner("qwq_jax", 100, [2.0, 1.0]), runner("a", 100, [4.0, 5.0]), runner("b", 50, [1.0])]
    text = report(parse(TINY), [*runners, runner("c", 80, [1.0], foresees=True)], ["a note"], 1.5)
    assert "best peer: b; qwq_jax is 2.00 times as fast" in text
    assert "| a | 25.0 | 22.2 | 4.00 |" in text and "- a note" in text
    assert "nobody knows beforehand would be at 1.25" in text


@pytest.fixture
def one_thread():
    """Torch's threads would wait for each other when tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_measures_all_and_a_wrong_token_is_told(tmp_path):
    runners, notes = measure(parse(TINY), tmp_path)
    assert [runner.name for runner in runners][:3] == [
        "qwq_jax",
        "transformers, batches of 2",
        "transformers, batches of 2, sorted by prompts",
    ]
    assert all(len(runner.seconds) == 1 for runner in runners)
    assert any("single stream" in note for note in notes)
    work = Workload([[5, 6, 7]], [1])
    model = load_peer(tmp_path / "source")
    wrong = [text for token in range(40) for text in disagreements(model, work, [(token,)])]
    assert len(wrong) >= 39 and "below the likeliest" in wrong[0]
