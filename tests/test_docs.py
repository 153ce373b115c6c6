"""README.md and docs/ name nothing that is not there, and every command in them can be parsed."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import options
from tokenflow.cli import parse
from tokenflow.config import ControlNetConfig, PnPConfig, PreprocessConfig, SDEditConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_BYTES = 10_240

COMMANDS = {
    "preprocess.py": (PreprocessConfig, None),
    "run_tokenflow_pnp.py": (PnPConfig, "config_pnp.yaml"),
    "run_tokenflow_sdedit.py": (SDEditConfig, "config_sdedit.yaml"),
    "run_tokenflow_controlnet.py": (ControlNetConfig, "config_controlnet.yaml"),
}
LAUNCHERS = [("accelerate", "commands/launch.py"), ("torch", "distributed/run.py")]
CODE = ("benchmarks", "shapes", "tokenflow")
FOLDERS = (*CODE, "configs", "data", "docs", "tests")
OF_THE_USER = {"edited-videos.txt"}  # what a command in a page itself writes

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


@cache
def sources() -> str:
    """The text of all code, in which the names of all files that commands write occur."""
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [*sorted(ROOT.glob("*.py")), ROOT / "Makefile"]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def flags_in(source: str) -> set[str]:
    """The flags that a file's text adds to a parser."""
    return set(re.findall(r"""add_argument\(\s*"(--\w+)""", source))


def flags_of_module(path: Path) -> set[str]:
    """The flags of `python -m`, for the file of a module."""
    flags = flags_in(path.read_text(encoding="utf-8"))
    if path.parent.name == "benchmarks":
        flags |= flags_in((path.parent / "arguments.py").read_text(encoding="utf-8"))
    if path == ROOT / "shapes" / "train.py":  # one for each stage
        (budgets,) = re.findall(r"^BUDGETS = (\{.*?^\})", path.read_text(), re.M | re.S)
        flags |= {f"--{stage}" for stage in ast.literal_eval(budgets)}
    return flags


@cache
def all_flags() -> set[str]:
    flags = {f"--{f.name}" for cls, _ in COMMANDS.values() for f in fields(cls)}
    flags |= {"--config_path"}
    for folder in ("benchmarks", "shapes"):
        flags = flags.union(*map(flags_of_module, (ROOT / folder).glob("*.py")))
    for package, file in LAUNCHERS:
        source = Path(find_spec(package).origin).parent / file
        flags |= set(re.findall(r'"(--n\w+)"', source.read_text(encoding="utf-8")))
    return flags


def code_of(text: str) -> list[str]:
    """The code in a page: lines of its blocks, without comments, and what is in backticks elsewhere."""
    blocks = re.findall(
        r"^```\n(.*?)^```$", text, re.M | re.S
    )  # those of a language are no commands
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [*filter(None, lines), *spans]


def occurs(name: str) -> bool:
    """Whether the code names it, and not only as a part of a longer name."""
    return bool(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", sources()))


def exists(word: str) -> bool:
    """Whether a file or folder is in the repository or, by its name, one that a command writes."""
    parts = Path(word).parts
    if any(ROOT.glob(word.rstrip("/"))) or word in OF_THE_USER:
        return True
    in_repository = parts[0] in FOLDERS or word.endswith((".py", ".md"))
    return not in_repository and occurs(parts[0])


def wrong_names(text: str) -> list[str]:
    """Files, folders, modules, make targets, flags and options that a page names and that are not there."""
    wrong = [flag for flag in re.findall(r"(?<![\w-])--\w+", text) if flag not in all_flags()]
    for code in code_of(text):
        for target in re.findall(r"^make (\S+)", code):
            if f"\n{target}:" not in (ROOT / "Makefile").read_text():
                wrong.append(target)
        for module, rest in re.findall(r"python -m ([\w.]+)(.*)", code):
            path = ROOT / f"{module.replace('.', '/')}.py"
            if not path.is_file() or "__main__" not in path.read_text(encoding="utf-8"):
                wrong.append(module)
            else:
                wrong += set(re.findall(r"--\w+", rest)) - flags_of_module(path)
        for word in re.findall(r"[\w./*-]+", re.sub(r'"[^"]*"', "", code)):
            is_path = re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+|[\w*-]+\.[a-z]\w+", word)
            if is_path and not re.search(rf"-m {re.escape(word)}", code):
                wrong += [] if exists(word) else [word]
            elif re.fullmatch(r"[a-zA-Z]+(_\w+)+", word) and not occurs(word):
                wrong.append(word)
    return wrong


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Scripts and their arguments, of every line of a block that runs one."""
    found = []
    for line in code_of(text):
        words = shlex.split(re.split(r"[|;]", line)[0])
        scripts = [word for word in words if word in COMMANDS]
        if scripts and len(words) > 1:
            found.append((scripts[0], words[words.index(scripts[0]) + 1 :]))
    return found


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_everything_named_exists(path):
    assert wrong_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        *("`tokenflow/editor.py`", "`editor.py`", "`docs/nothing.md`", "`requirements-gpu.txt`"),
        *(
            "`tokenflow/editing/nothing/`",
            "`configs/nothing*.yaml`",
            "`nothing.mp4`",
            "`make nothing`",
        ),
        *(
            "`python -m benchmarks.nothing`",
            "`python -m benchmarks.settings --quick`",
            "`no_option`",
        ),
        *("use --guidance_scael", "```\npython nothing.py\n```"),
    ],
)
def test_a_wrong_name_is_found(text):
    assert len(wrong_names(text)) == 1


@every_page
def test_commands_can_be_parsed(path):
    commands = commands_of(path.read_text(encoding="utf-8"))
    assert path.name != "README.md" or {script for script, _ in commands} == set(COMMANDS)
    for script, arguments in commands:
        cls, yaml = COMMANDS[script]
        parse(cls, "", yaml, arguments)


@every_page
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_options_page_is_what_is_generated():
    assert options.PAGE.read_text(encoding="utf-8") == options.page(), (
        "run: python -m benchmarks.options"
    )


def test_options_page_needs_no_torch():
    code = "import sys, benchmarks.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
