"""Every command of the README parses, and its Python runs."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from qwq_jax.__main__ import app
from qwq_jax.config.constraint import CONSTRAINT_FIELDS
from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.load import build, load_toml
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.config.train import SftConfig
from qwq_jax.jobs.batch_file import PromptLine, parse_line
from qwq_jax.jobs.plan import read_topologies
from qwq_jax.jobs.plan_job import read_job

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


COMMANDS = [line for block in blocks("bash") for line in block.strip().splitlines()]


def test_there_are_commands():
    verbs = {shlex.split(line)[1] for line in COMMANDS if line.startswith("qwq-jax ")}
    assert {"convert", "export", "generate", "chat", "serve", "warm-up", "sft", "rl", "eval", "plan"} <= verbs


def build_settings(verb: str, given: dict[str, Any]) -> None:
    """What the verb does with its settings before it loads anything."""
    overrides = given.get("overrides") or ()
    if verb == "sft":
        load_toml(ROOT / given["config"], SftConfig, overrides)
    elif verb == "rl":
        load_toml(ROOT / given["config"], RlConfig, overrides)
    elif verb == "plan":
        read_topologies(given["topology"], given["all_topologies"])
        read_job(
            ROOT / given["config"], overrides, model=ROOT / given["model"], reward_model=None, lengths=(None, None)
        )
    elif "overrides" in given:
        build(InferenceConfig, {}, overrides, source="settings")


def test_a_mistyped_setting_is_noticed():
    with pytest.raises(ValueError, match="mesh.tensr: unknown key"):
        test_a_command_parses("qwq-jax generate ck --input i --output o --set mesh.tensr=8")
    with pytest.raises(ValueError, match="optimizer.lr: unknown key"):
        test_a_command_parses("qwq-jax sft configs/sft/qwq_32b_sft.toml --set optimizer.lr=1")


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install '\.\[([^]]+)\]'", TEXT)
    assert named and {extra for each in named for extra in each.split(",")} <= extras.keys()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line: str):
    program, verb, *arguments = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{re.escape(verb)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert program == "qwq-jax"
    group = typer.main.get_command(app)
    command = group.commands[verb]  # type: ignore[attr-defined]
    build_settings(verb, command.make_context(verb, list(arguments)).params)
    for argument in arguments:
        if argument.startswith(("configs/", "tools/")):
            assert (ROOT / argument).exists(), argument


def test_paths_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    listing = next(block for block in blocks("") if block.startswith("qwq_jax/"))
    for name in re.findall(r"^  ([a-z_]+(?:/|\.py))", listing, re.MULTILINE):
        assert (ROOT / "qwq_jax" / name).exists(), name
    rooms = {path.parent.name for path in (ROOT / "qwq_jax").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"\b([a-z]+)/", listing))


def test_the_request_line_is_understood():
    (line,) = blocks("json")
    assert isinstance(parse_line(1, line.encode()), PromptLine)
    assert json.loads(line)["body"]["return_token_ids"] is True


def test_the_fields_of_requests_are_there():
    (sentence,) = re.findall(r"Beside these fields(.*?)anything else is refused", TEXT, re.DOTALL)
    named = set(re.findall(r"`(\w+)`", sentence))
    assert len(named) > 10 and named <= {*SamplingParams.model_fields, *CONSTRAINT_FIELDS}
    (line,) = blocks("json")
    missing = SamplingParams.model_fields.keys() - named - json.loads(line)["body"].keys()
    assert missing == {"constraint"}, "it has the names of its API"


def test_the_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from qwq_jax.embedded import TINY_REASONER
    from qwq_jax.jobs.convert import convert

    monkeypatch.chdir(tmp_path)
    convert(str(TINY_REASONER), "out/demo/checkpoint")
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 11
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert "\\boxed{" in capsys.readouterr().out
