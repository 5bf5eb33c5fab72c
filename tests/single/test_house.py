"""The rules of the code, held against the code: imports and their direction, the facade, examples in docstrings."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import distpad
import suites

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "distpad").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}

# From top to bottom: a package imports from packages below it alone. Those of one line know nothing of each other.
PACKAGES = (
    "__main__",
    "cli",
    "__init__",  # the facade; the command line stands above it, since it uses what users use
    "certification data metrics",
    "losses",
    "gradients layers saving",
    "collectives",
    "backends padding",
    "launcher precision versions",
    "errors",
)
# The private names of others that are read: what Python documents in spite of the underscore (NamedTuple's methods,
# os._exit, sys._current_frames), and Keras's mask, for which there is no other way (backends/keras_masks.py says why).
PRIVATE_NAMES = {"_asdict", "_current_frames", "_exit", "_fields", "_keras_mask", "_replace"}
# Of Keras's trainer and of PerReplica's spec: the one module that replaces private functions says why.
PRIVATE_NAMES_OF = {"distpad.backends.keras_fit": {"_distributed_dataset", "_value_specs"}}
SETTINGS = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=SETTINGS, capture_output=True, text=True, timeout=240)


# -- import distpad ---------------------------------------------------------------------------------------------------


def test_import_is_silent_and_imports_no_framework():
    done = run("import sys, distpad; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    loaded = set(done.stdout.split())
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1
    assert "distpad" in loaded
    assert not loaded & {"tensorflow", "keras", "horovod", "tensorflow_addons", "typer", "rich"}


COST = """
import json, os, sys, time
blocked = ["horovod", "horovod.tensorflow", "tensorflow_addons"]
sys.modules.update(dict.fromkeys(blocked))
import tensorflow
loaded = set(sys.modules)

def touch_all():
    import distpad
    for name in distpad.__all__:
        getattr(distpad, name)
    return distpad

for _ in range(5):  # each in a fork of this process, which has imported TensorFlow and nothing else
    if os.fork() == 0:
        start = time.process_time()  # what others do on this machine does not count
        touch_all()
        os.write(1, f"{time.process_time() - start}\\n".encode())
        os._exit(0)
    assert os.wait()[1] == 0
distpad = touch_all()
loss = distpad.DistributedLoss(lambda t, p: abs(t - p))(tensorflow.zeros([1, 2]), tensorflow.ones([1, 2]), lengths=[1])
assert float(loss) == 1 and distpad.pad([[1, 2], [3]]).lengths.tolist() == [2, 1]
assert all(sys.modules[name] is None for name in blocked)
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - loaded})))
"""


@pytest.mark.timeout(300)
def test_import_costs_little_and_needs_no_engine():
    """Every public name, in less than 0.2 s on top of TensorFlow's own import; Horovod and Addons unimportable."""
    done = run(COST)
    assert done.returncode == 0, done.stderr
    *seconds, added = done.stdout.splitlines()
    assert len(seconds) == 5
    assert min(map(float, seconds)) < 0.2, seconds  # a neighbour on the same core makes the others dearer
    assert not set(json.loads(added)) & {"horovod", "tensorflow_addons", "typer", "rich"}


# -- the facade -------------------------------------------------------------------------------------------------------


def test_the_facade_lists_the_same_names_twice():
    (block,) = (
        node
        for node in TREES["distpad.__init__"].body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    )
    names = [alias.asname for node in block.body for alias in node.names]
    assert names and sorted(names) == distpad.__all__ == dir(distpad)


@pytest.mark.parametrize("name", distpad.__all__)
def test_public_names_resolve(name):
    found = getattr(distpad, name)
    assert getattr(found, "__name__", "").endswith(name)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        AttributeError, match=r"has no attribute 'pads'; it has: Batch, Buckets, CTC, Certificate, .*unpad"
    ):
        distpad.pads  # noqa: B018 (the access is what is tested)


# -- the direction of imports -----------------------------------------------------------------------------------------


def imports(name: str) -> set[str]:
    """All modules that a module imports, also those inside functions; distpad's own down to the module."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {full for full in inner if full in SOURCES or f"{full}.__init__" in SOURCES}
            found |= modules | ({node.module} if inner - modules else set())
    return {f"{module}.__init__" if f"{module}.__init__" in SOURCES else module for module in found}


def own_imports(name: str) -> set[str]:
    return {module for module in imports(name) if module.split(".")[0] == "distpad"}


def package(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_its_package():
    listed = " ".join(PACKAGES).split()
    assert {package(module) for module in SOURCES} == set(listed), "add the module to PACKAGES, at its height"
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    heights = {name: height for height, line in enumerate(PACKAGES) for name in line.split()}
    mine = heights[package(module)]
    upwards = {
        other for other in own_imports(module) if package(other) != package(module) and heights[package(other)] <= mine
    }
    assert not upwards


def test_no_cycles():
    """Inside a package, too; a package's __init__ counts as importing what it names, not as imported by its modules."""
    left = {module: own_imports(module) - {module} for module in SOURCES}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left


def names_of(tree: ast.AST) -> set[str]:
    """Every dotted name in a module, such as tf.distribute.Strategy."""
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in dotted if re.fullmatch(r"[\w.]+", name)}


# A program asks Horovod how it was built, since loading Horovod may end a process; an error says how to initialise it.
KNOWING = ("distpad.launcher.builds", "distpad.launcher.topology")


@pytest.mark.parametrize("module", [module for module in SOURCES if package(module) != "backends"])
def test_only_backends_know_an_engine(module):
    if module in KNOWING:
        return
    assert not {name for name in imports(module) if name.split(".")[0] == "horovod"}
    assert "horovod.tensorflow" not in SOURCES[module].read_text(encoding="utf-8")
    assert not {name for name in names_of(TREES[module]) if re.match(r"(tf|tensorflow)\.distribute\b", name)}


@pytest.mark.parametrize("module", SOURCES)
def test_no_private_names_of_others(module):
    text = SOURCES[module].read_text(encoding="utf-8")
    assert not re.findall(r"tensorflow\.python|keras\.src|_keras_api|horovod\.common|mpi_ops", text)
    read = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and not re.fullmatch("self|cls", ast.unparse(node.value)):
            read.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            read |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    private = {name for name in read if isinstance(name, str) and re.match(r"_(?!_)", name)}
    assert private <= PRIVATE_NAMES | PRIVATE_NAMES_OF.get(module, set())


# -- sizes ------------------------------------------------------------------------------------------------------------

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 450, 60  # docstrings of functions left out


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module):
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) <= LINES_OF_A_FILE
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < LINES_OF_A_FUNCTION, node.name


# -- docstrings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [  # a certificate takes ten seconds: tests/single/certification/test_certificate.py shows it on both stacks
        pytest.param(module, marks=[pytest.mark.one_stack] * (module == "distpad.certification.certificate"))
        for module in SOURCES
        if not module.endswith("__main__")
    ],
)
def test_examples_in_docstrings_run(module):
    found = importlib.import_module(module.removesuffix(".__init__"))
    failed, _ = doctest.testmod(found, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed


CALLABLES = [name for name in distpad.__all__ if callable(getattr(distpad, name))]


@pytest.mark.parametrize("name", CALLABLES)
def test_public_names_have_an_example(name):
    found = getattr(distpad, name)
    text = inspect.getdoc(found) or ""
    assert text.splitlines()[0].endswith((".", ":")), "the first line is a sentence"
    if inspect.isclass(found) and issubclass(found, Exception):
        return  # how an error is raised is shown where it is raised
    assert found.__doc__ is not getattr(found.__mro__[1], "__doc__", None) if inspect.isclass(found) else True
    assert ">>> " in text


@pytest.mark.parametrize("name", [name for name in CALLABLES if inspect.isfunction(getattr(distpad, name))])
def test_public_functions_name_their_arguments(name):
    found = getattr(distpad, name)
    text = inspect.getdoc(found) or ""
    assert "Args:" in text and re.search("^(Returns|Raises):", text, re.MULTILINE)
    for argument in inspect.signature(found).parameters:
        assert re.search(rf"\b{argument}\b", text.split("Args:")[1]), f"{argument} is not described"


# -- tests ------------------------------------------------------------------------------------------------------------


def test_tests_mirror_the_layout():
    """Tests of one package in one process are in a folder of its name."""
    folders = {path.name for path in (ROOT / "tests" / "single").iterdir() if any(path.glob("test_*.py"))}
    assert folders <= {package(module) for module in SOURCES}


# -- files ------------------------------------------------------------------------------------------------------------


def committed_files() -> list[pathlib.Path]:
    """What git knows or would add; outside a checkout, all that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split("\0") if done.returncode == 0 else map(str, ROOT.rglob("*"))
    found = [ROOT / name for name in names if name]
    hidden = [
        path for path in found if done.returncode and any(part[0] == "." for part in path.relative_to(ROOT).parts)
    ]
    return [path for path in found if path.is_file() and path not in hidden]


def test_no_file_names_the_place_where_it_was_written():
    places = "|".join(["work", "root", "opt/wheels", "tmp/envs"])
    pattern = re.compile(rf"(?<![\w.}})-])/(?:{places})(?![\w-])")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in committed_files()
        if path.parent.name != "crds"  # whose operators name folders of their containers
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


# -- the suites -------------------------------------------------------------------------------------------------------

DEFAULT = {(suite.stack, suite.name): suite.command for suite in suites.SUITES if suite.command}
EVERY = {(suite.stack, suite.name): suite.under_all or suite.command for suite in suites.SUITES}
CHOOSES = re.compile(r" -[mk] (?!pytest)")


def test_every_suite_stands_in_the_table_once_and_runs_something():
    assert len(EVERY) == len(suites.SUITES) and all(EVERY.values())


def test_every_engine_and_every_kind_of_test_runs_by_default():
    whole = {suite for suite, command in DEFAULT.items() if not CHOOSES.search(command)}
    worlds = ("mirrored:2",)  # what workers do otherwise is in the parts of the others
    kinds = ("lint", "single", "docs", "launch", "launcher", "cluster", "k8s", "examples", "faults")
    assert whole >= {("current", name) for name in (*worlds, *kinds)}
    parts = ("local", "onedevice", "multiworker:2", "mirrored:4", "horovod:2", "horovod:3", "mpirun:2")
    assert set(DEFAULT) >= {("current", name) for name in parts}
    assert set(DEFAULT) >= {("classic", name) for name in ("single", *worlds, "multiworker:2", "horovod:2", "examples")}


def test_under_all_nothing_is_left_out():
    chosen = {suite for suite, command in EVERY.items() if CHOOSES.search(command)}
    assert chosen == {("classic", "smoke")}  # a part of what runs whole on the current stack


def test_ci_runs_the_default_tests():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "set -euo pipefail",
        "export CI=true",
        'exec bash "$(dirname "${BASH_SOURCE[0]}")/../tests/run.sh"',
    ]


def test_worlds_that_tests_name_are_suites():
    """One that no suite has would never be run."""
    worlds = {name for stack, name in EVERY if stack == "current"}
    for path in (ROOT / "tests" / "replicas").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for named in re.findall(r"^WORLDS = \((.*)\)$|mark\.worlds\((.*?)\)", text, re.MULTILINE):
            assert set(ast.literal_eval(f"[{''.join(named)}]")) <= worlds, path.name


def test_every_test_module_is_in_a_suite():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT)
        name = "worlds.py mirrored:2" if folder.name == "replicas" else "/".join(folder.parts[:2])
        name = "worlds.py horovod:2" if folder.name == "workers" else name
        runs = [
            command
            for command in DEFAULT.values()
            if name in command and f"--ignore {folder / path.name}" not in command
        ]
        assert runs, f"{path.name} is in no suite of tests/suites.py"
