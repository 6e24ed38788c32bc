"""What recipes say of a chip's memory is what the compiler said, of the recipe as it is now, and it fits."""

import re
from pathlib import Path

import pytest

from qwq_jax.config.load import load_toml
from qwq_jax.config.rl import RlConfig
from qwq_jax.plan.cost import ProgramCost
from qwq_jax.plan.memory import Memory
from tools.rl_memory import RECIPES, REPORT, ROOT, description, recipe_memory, section, write

# Of what a chip has: the rest is for what no compiler counts, such as gaps between arrays.
MOST = 0.95


def needs(temporaries: int, result: int) -> ProgramCost:
    return ProgramCost(temporaries, result, 0, 0.0, 0)


MEMORY = Memory(
    usable=100,
    held={"trained weights and moments": 20, "programs": 1},
    engine={"engine's weights": 10, "key-value cache": 30},
    gradients=7,
    programs={
        "gradient": needs(40, 0),
        "update": needs(1, 2),
        "sync": needs(5, 10),
        "reference": needs(12, 0),
        "decode": needs(3, 1),
        "prompts": needs(2, 0),
    },
)


def reported(name: str) -> tuple[str, dict[str, float], float]:
    """A recipe's part of the report, the phases in it, and the bytes that are usable, both in GB."""
    text = next(part for part in re.split(r"^## ", REPORT.read_text(), flags=re.M) if part.startswith(f"{name}\n"))
    head, table = re.split(r"^\| phase .*usable ([\d.]+) GB \|$", text, flags=re.M)[1:]
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.]+) \| [\d.]+% \|$", table, flags=re.M)
    return text, {phase: float(size) for phase, size in rows}, float(head)


def test_each_phase_is_what_lies_there_at_one_time() -> None:
    assert MEMORY.peaks == {
        "rollout": 21 + 40 + 4,
        "log-probabilities": 21 + 12,
        "gradient": 21 + 7 + 40,
        "update": 21 + 7 + 3,
        "sync": 21 + 15,
    }
    assert MEMORY.peak == 68


def test_sections_are_replaced_and_keep_the_order_of_the_recipes(tmp_path: Path) -> None:
    path, names = tmp_path / "report.md", list(RECIPES)
    config = load_toml(ROOT / "configs" / "rl" / f"{names[0]}.toml", RlConfig)
    old, new = (section(name, config, MEMORY) for name in (names[1], names[0]))
    write({names[1]: old}, path)
    write({names[0]: new}, path)
    text = path.read_text()
    assert re.findall(r"^## (\w+)$", text, flags=re.M) == names[:2]
    assert text.index("**Nothing here was run on a chip.**") < text.index(new) < text.index(old)
    write({names[0]: new}, path)
    assert path.read_text() == text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_was_measured_of_it_and_fits(name: str) -> None:
    path = ROOT / "configs" / "rl" / f"{name}.toml"
    config, text = load_toml(path, RlConfig), path.read_text()
    part, phases, usable = reported(name)
    assert description(name, config) in part, "the recipe has changed: python -m tools.rl_memory measures it again"
    assert {"rollout", "gradient", "update", "sync"} <= phases.keys()
    assert max(phases.values()) < MOST * usable
    said = ", ".join(f"{phase} {size:.1f}" for phase, size in phases.items())
    header = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert f"{said} GB of the {usable:.1f} GB of a chip" in header
    assert RECIPES[name].topology in header


def test_large_recipes_are_measured() -> None:
    names = {path.stem for path in (ROOT / "configs" / "rl").glob("*.toml")}
    assert {name for name in names if not name.startswith("tiny")} == set(RECIPES)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_of_one_session_is_as_it_says() -> None:
    name = "r1_distill_1p5b_lora_v5e8"
    _, memory = recipe_memory(name)
    _, phases, usable = reported(name)
    assert memory.usable / 1e9 == pytest.approx(usable, rel=0.01)
    for phase, size in memory.peaks.items():
        assert size / 1e9 == pytest.approx(phases[phase], rel=0.02), phase
