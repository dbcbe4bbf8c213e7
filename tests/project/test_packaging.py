"""pyproject.toml, constraints.txt, environment.yml and the tree say the same, and what they say installs."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TOP = {
    "notebooks", "magic", "tests", "environment.yml", "README.md", "CONTRIBUTING.md", "pyproject.toml",
    "constraints.txt", "LICENSE", ".gitignore", ".ci",
}  # fmt: skip
# what `import magic` must do without, though it is installed
LATER = [
    "torchvision",
    "pandas",
    "seaborn",
    "matplotlib",
    "sklearn",
    "safetensors",
    "joblib",
    "trak",
    "kronfluence",
    "transformers",
    "peft",
]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def course() -> list[str]:
    """The requirements of the core, the notebooks, the site and the tests."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = [extras[name] for name in ("notebooks", "baselines", "site", "test")]
    return sum(wanted, project["dependencies"])


def pinned() -> list[str]:
    """What `course` requires, and what drives a browser, which few machines have."""
    return course() + pyproject()["project"]["optional-dependencies"]["browser"]


def pip_section() -> list[str]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    return next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def normal(requirements: list[str]) -> list[str]:
    return sorted(str(Requirement(r)) for r in requirements)


def names(requirements: list[str]) -> list[str]:
    return sorted(Requirement(r).name for r in requirements)


def git(*arguments: str) -> subprocess.CompletedProcess:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_core_needs_torch_and_numpy_only():
    assert names(pyproject()["project"]["dependencies"]) == ["numpy", "torch"]


def test_environment_names_what_pyproject_names():
    options = [line for line in pip_section() if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    assert normal([line for line in pip_section() if line not in options]) == normal(course())


def test_environment_and_pyproject_ask_for_the_same_python():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(d for d in environment["dependencies"] if str(d).startswith("python"))
    assert python == f"python {pyproject()['project']['requires-python']}"
    assert (environment["name"], environment["channels"]) == ("magic", ["conda-forge"])


def test_each_package_is_pinned_once_and_for_all():
    assert names(constraints()) == names(pinned())
    assert all(str(Requirement(c).specifier).startswith("==") for c in constraints())
    assert normal(pyproject()["tool"]["uv"]["constraint-dependencies"]) == normal(constraints())


def test_the_pins_are_within_the_requirements():
    versions = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, constraints())}
    for requirement in map(Requirement, pinned()):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_the_lock_file_stays_out():
    assert git("ls-files", "uv.lock").stdout == ""
    assert git("check-ignore", "-q", "uv.lock").returncode == 0


def test_the_top_level_is_short():
    listed = git("ls-files")
    assert listed.returncode == 0, listed.stderr
    top = {line.split("/")[0].strip('"') for line in listed.stdout.splitlines()}
    assert {"magic", "pyproject.toml"} <= top, "no files were seen"
    assert top <= TOP, f"not at the top level: {sorted(top - TOP)}"


def test_import_magic_imports_no_more_than_it_needs():
    absent = [name for name in LATER if importlib.util.find_spec(name) is None]
    assert not absent, f"not installed, so that this test says nothing: {absent}"
    code = f"import sys, magic; print(*(name for name in {LATER} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def lend_bytecode(here: Path, there: Path) -> None:
    """Link what this environment has compiled into another one, which saves it half a minute.

    Python compiles a file anew if its size or time is not that of the one that was compiled.
    """
    for compiled in here.rglob("__pycache__"):
        place = there / compiled.relative_to(here)
        if place.parent.is_dir() and not place.exists():
            with contextlib.suppress(OSError):  # on Windows it takes a right
                place.symlink_to(compiled, target_is_directory=True)


@pytest.mark.slow
def test_environment_installs_into_a_fresh_environment(pytestconfig):
    """As conda does it: the pip section becomes a requirements file next to environment.yml."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if not uv:
        pytest.skip("needs uv: pip install uv")

    def check(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done.stdout

    # beside the project, where one environment already had room, and removed at the end
    with tempfile.TemporaryDirectory(dir=pytestconfig.cache.mkdir("environment")) as folder:
        project, python = Path(folder, "project"), Path(folder, "venv", "bin", "python")
        if os.name == "nt":
            python = Path(folder, "venv", "Scripts", "python.exe")
        shutil.copytree(ROOT / "magic", project / "magic", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, project)
        (project / "requirements.txt").write_text("\n".join(pip_section()) + "\n")

        check(uv, "venv", "--quiet", "--python", sys.executable, Path(folder, "venv"))
        check(uv, "pip", "install", "--quiet", "--python", python, "-r", "requirements.txt")
        lend_bytecode(Path(sysconfig.get_path("purelib")), next(Path(folder, "venv").rglob("site-packages")))
        code = "import magic, torch, torchvision, seaborn; print(magic.__file__)"
        imported = check(python, "-P", "-c", code).strip()
        assert Path(imported).resolve() == (project / "magic" / "__init__.py").resolve()
        installed = set(check(uv, "pip", "freeze", "--python", python).splitlines())

    every = [r for r in map(Requirement, constraints()) if r.marker is None or r.marker.evaluate()]
    pins = [r for r in every if r.name in names(course())]  # all but what drives a browser
    assert len(pins) > 20
    wrong = [f"{r.name}{r.specifier}" for r in pins if f"{r.name}{r.specifier}" not in installed]
    assert wrong == [], f"pinned, but installed otherwise: {wrong}"
