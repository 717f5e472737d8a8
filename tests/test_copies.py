"""Each script stands alone, so what several need stands in each of them: this holds the copies equal, word for word."""

import ast
import itertools
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["srpo_critic.py", "srpo_behavior.py", "srpo_actor.py", "eval.py"]
STAGE_SCRIPTS = SCRIPTS[:3]
OWN = {"Args", "STAGE", "METRICS", "FILES", "MAY_CHANGE", "make_update"}  # what each has under the same name
OWN |= {"evaluate"}  # eval.py's plays also policies that sample, several episodes at once
SECTIONS = "Args STAGE METRICS FILES MAY_CHANGE Linear make_update capture load open_run".split()
LOADING = ["minari_ids", "open_dataset", "flatten", "load_dataset"]  # not in the actor, which reads artifacts alone
LONGEST = {"srpo_critic.py": 400, "srpo_behavior.py": 415, "srpo_actor.py": 505, "eval.py": 510}


def source(script):
    return (ROOT / script).read_text()


def pieces(script):
    """Top-level classes, functions and constants: name -> text."""
    text, found = source(script), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            continue
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        found |= dict.fromkeys(names, "\n".join(text.splitlines()[first - 1 : node.end_lineno]))  # with comments
    return found


def args_of(script):
    """The fields of Args: name -> (annotation, help)."""
    (args,) = [
        node for node in ast.parse(source(script)).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    fields = {}
    for field, text in zip(args.body[::2], args.body[1::2], strict=True):  # one line of help under each field
        assert (
            isinstance(field, ast.AnnAssign) and isinstance(text.value, ast.Constant) and "\n" not in text.value.value
        )
        fields[field.target.id] = ast.unparse(field.annotation), text.value.value
    return fields


@pytest.mark.parametrize("one, two", list(itertools.combinations(SCRIPTS, 2)))
def test_pieces_of_the_same_name_are_identical(one, two):
    a, b = pieces(one), pieces(two)
    shared = (a.keys() & b.keys()) - OWN
    assert {"Linear", "load"} <= shared
    for name in shared:
        assert a[name] == b[name], f"{name} differs between {one} and {two}"


def test_the_stages_share_what_they_should():
    shared = set.intersection(*(set(pieces(script)) for script in STAGE_SCRIPTS)) - OWN
    assert set(SECTIONS) - OWN <= shared
    assert set(LOADING) <= set(pieces("srpo_critic.py")) & set(pieces("srpo_behavior.py"))
    assert not set(LOADING) & set(pieces("srpo_actor.py")) and "minari.load" not in source("srpo_actor.py")
    assert {"mlp", "twin_q"} <= set(pieces("srpo_critic.py")) & set(pieces("srpo_actor.py"))
    assert {"BehaviorModel", "alpha_sigma"} <= set(pieces("srpo_behavior.py")) & set(pieces("srpo_actor.py"))
    assert {"make_env", "select"} <= set(pieces("eval.py")) & set(pieces("srpo_actor.py"))


@pytest.mark.parametrize("script", STAGE_SCRIPTS)
def test_sections_come_in_the_same_order(script):
    order = [name for name in pieces(script) if name in SECTIONS + LOADING]
    assert order == (SECTIONS if script == "srpo_actor.py" else SECTIONS[:5] + LOADING + SECTIONS[5:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_one_line_of_help(script):
    assert all(text for _, text in args_of(script).values())


def test_flags_of_the_same_name_mean_the_same():
    everywhere = set.intersection(*(set(args_of(script)) for script in STAGE_SCRIPTS))
    differ = {"seed", "num_seeds", "batch_size", "lr"}  # the actor takes its seeds from the artifacts
    for name in everywhere - differ:
        assert len({args_of(script)[name] for script in STAGE_SCRIPTS}) == 1, f"--{name} differs"


def main_lines(script):
    """The main part, with one name for what each stage calls differently."""
    text = source(script).partition('if __name__ == "__main__":\n')[2]
    for own in ("policy", "critic"):
        text = text.replace(f"{own}", "model")
    return [line.strip() for line in text.splitlines() if line.strip() not in ("", "try:", "else:")]


@pytest.mark.parametrize("script, share", [("srpo_critic.py", 0.8), ("srpo_actor.py", 0.55)])
def test_the_loops_read_alike(script, share):
    ours, theirs = main_lines(script), main_lines("srpo_behavior.py")
    shared = [line for line in theirs if line in ours]
    assert [line for line in ours if line in shared] == shared, "the same lines come in another order"
    assert len(shared) >= share * len(theirs), f"only {len(shared)} of {len(theirs)} lines are still the same"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_only_libraries(script):
    for node in ast.walk(ast.parse(source(script))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert not (ROOT / f"{name.partition('.')[0]}.py").exists(), f"{script} imports {name}"


def test_importing_the_scripts_does_nothing(tmp_path):
    code = "import sys, srpo_critic, srpo_behavior, srpo_actor, eval; assert 'gymnasium_robotics' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, longest", LONGEST.items())
def test_a_script_stays_short(script, longest):
    assert len(source(script).splitlines()) <= longest


def test_readme_quotes_the_loss():
    """The code in README's introduction is the body of actor_loss."""
    quoted = (ROOT / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    assert quoted.startswith("    a = policy(s)\n") and f'"""\n{quoted}\n\ndef make_update' in source("srpo_actor.py")
