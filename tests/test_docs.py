"""README.md and docs/ are current: what they name exists, and their commands are accepted."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_cli import ROOT, TECHNIQUES

from benchmarks import options
from tokenflow.cli import parse
from tokenflow.config import EditConfig, PreprocessConfig
from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.config_sweep import parse_sweep

COMMANDS = {"preprocess.py": (PreprocessConfig, None)} | {
    f"run_tokenflow_{name}.py": (cls, f"config_{name}.yaml") for name, cls in TECHNIQUES.items()
}
COMMANDS["evaluate.py"] = (EvaluateConfig, "config_evaluate.yaml")
README_BYTES = 10_240
PATH = r"[\w.-]+\.(?:py|md|yaml|txt|jpg)|[\w.-]+/[\w./-]*"

every_page = pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)


def blocks_of(text: str) -> list[str]:
    """The lines of a page's command blocks, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
    return [line.partition(" #")[0] for block in blocks for line in block.splitlines()]


@every_page
def test_commands_are_accepted(page):
    text = page.read_text(encoding="utf-8")
    scripts = set()
    for line in blocks_of(text):
        words = shlex.split(re.split(r"[|;]", line)[0])
        for script in set(words) & set(COMMANDS):
            cls, yaml = COMMANDS[script]
            read = parse_sweep if issubclass(cls, EditConfig) else parse
            read(cls, "", yaml, words[words.index(script) + 1 :])
            scripts.add(script)
    assert page.name != "README.md" or scripts >= set(COMMANDS) - {"evaluate.py"}
    modules = re.findall(r"python -m ((?:benchmarks|shapes)\.\w+)([^`\n]*)", text)
    for module, arguments in modules:
        source = Path(find_spec(module).origin).read_text()
        shared = (ROOT / "benchmarks" / "arguments.py").read_text()
        for flag in re.findall(r"--(\w+)", arguments):
            assert f'"--{flag}"' in source + shared or f'"{flag}": "' in source, (module, flag)


@every_page
def test_files_and_links_are_there(page):
    text = page.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!https:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = page.parent / link
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (target if link else page).read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    # What commands write is named by the code that writes it.
    code = "\n".join(path.read_text() for path in ROOT.glob("[tbs]*/**/*.py")) + "edited-videos.txt"
    for path in re.findall(rf"`({PATH})`", text):
        first = path.split("/")[0]
        assert (ROOT / path).exists() or (not (ROOT / first).exists() and first in code), path


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_options_page_is_what_is_generated():
    assert (
        options.PAGE.read_text(encoding="utf-8") == options.page()
    )  # python -m benchmarks.options
