"""What is to be ranked is read from a line or a file, and loaded when its turn comes."""

from pathlib import Path

import pytest
import torch
from toys import toy_base

from deltapatch.errors import DeltapatchError
from deltapatch.selection.ranking.candidates import (
    Candidate,
    as_candidates,
    parse_candidates,
    read_candidates,
)

OWN = """
import torch
def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(4, 3)).eval()
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "bases.toml"
    path.write_text(text)
    return path


def test_a_given_base_stays_itself_and_is_named_after_itself() -> None:
    base = toy_base()
    candidate = Candidate.of(base)
    assert candidate.load() is base
    assert candidate.name == "Net"
    assert Candidate.of(candidate) is candidate


def test_a_source_is_loaded_anew_each_time() -> None:
    candidate = Candidate(
        "small", "torchvision/squeezenet1_1", {"weights": "random", "size": 64, "name": "mine"}
    )
    first, again = candidate.load("cpu"), candidate.load("cpu")
    assert first is not again
    assert first.name == "mine"
    assert first.preprocessing.input_size == (3, 64, 64)


def test_a_line_holds_sources_and_files(tmp_path: Path) -> None:
    path = _write(
        tmp_path, '[[base]]\nsource = "demo"\nname = "small"\n\n[[base]]\nsource = "timm/resnet18"\n'
    )
    found = parse_candidates(f" torchvision/resnet50, {path},")
    assert [candidate.name for candidate in found] == ["torchvision/resnet50", "small", "timm/resnet18"]
    assert found[1].source == "demo"


def test_files_are_looked_for_beside_the_toml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    path = _write(
        tmp_path,
        '[[base]]\nsource = "own.py:network"\nweights = "own.pth"\nsize = [8, 10]\nmean = 0.5\nstd = 0.25\n'
        'classes = "names.txt"\nname = "own"\n',
    )
    namespace: dict[str, object] = {}
    exec(OWN, namespace)
    module = namespace["network"]()
    torch.save(module.state_dict(), tmp_path / "own.pth")
    monkeypatch.chdir("/")
    base = read_candidates(path)[0].load("cpu")
    assert base.preprocessing.input_size == (1, 8, 10)
    assert base.classes == ("a", "b", "c")
    assert torch.equal(base.module[3].weight, module[3].weight)


def test_random_weights_and_imagenet_classes_are_no_files(tmp_path: Path) -> None:
    path = _write(tmp_path, '[[base]]\nsource = "demo"\nweights = "random"\nclasses = "imagenet1k"\n')
    assert read_candidates(path)[0].options == {"weights": "random", "classes": "imagenet1k"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[base]]\nsource = "demo"\nsizes = 3\n',
            r"base 1 \('demo'\) has the unknown key 'sizes'; the keys are",
        ),
        ('[[base]]\nsource="demo"\n[[base]]\nname="x"\n', r"base 2 \('x'\) has no source"),
        ('[[base]]\nsource = "demo"\nsize = "big"\n', r"base 1 \('demo'\): size cannot be 'big'"),
        ('[[base]]\nsource = "demo"\ndevice = "cpu"\n', "unknown key 'device'"),
        ("base = 3\n", "holds no base"),
        ("", "holds no base"),
        ('[[bases]]\nsource = "demo"\n', "holds 'bases'; expected one"),
        ("[[base]\n", "is no TOML file"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_entry_s_name(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message) as caught:
        read_candidates(_write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "bases.toml"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match=r"none\.toml: cannot be read"):
        parse_candidates(str(tmp_path / "none.toml"))


def test_no_base_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(DeltapatchError, match="there is no base to rank"):
        parse_candidates(" , ")
    with pytest.raises(DeltapatchError, match="2 bases are called 'demo'"):
        parse_candidates("demo,demo")
    with pytest.raises(DeltapatchError, match="single text 'demo'"):
        as_candidates("demo")


def test_only_a_library_s_own_weights_are_what_results_were_published_of() -> None:
    assert Candidate.of("torchvision/resnet18").has_published_weights
    assert not Candidate("a", "torchvision/resnet18", {"weights": "own.pth"}).has_published_weights
    assert not Candidate.of("demo").has_published_weights
    assert not Candidate.of(toy_base()).has_published_weights


def test_a_base_of_texts_is_asked_about_the_task_s_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltapatch.selection.ranking import candidates

    asked: list[object] = []
    monkeypatch.setattr(candidates, "load_base", lambda source, **options: asked.append(options["classes"]))
    Candidate.of("open_clip/ViT-B-32/openai").load("cpu", ["cat", "dog"])
    Candidate("own", "open_clip/ViT-B-32/openai", {"classes": ["x"]}).load("cpu", ["cat", "dog"])
    assert asked == [["cat", "dog"], ["x"]]
