"""Every kind of thing that can be merged, opened and read part by part, and what is said of damaged ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import equal, random_model
from safetensors.torch import save_file
from torch import Tensor, nn

from deltapatch.errors import DeltapatchError
from deltapatch.merging import MergeError, open_source
from deltapatch.merging.sources import Source, open_sources

Model = dict[str, Tensor]


def read_all(source: Source) -> Model:
    return {name: source.whole(name).clone() for name in source.specs}


def saved(folder: Path, model: Model, name: str = "model.safetensors") -> Path:
    save_file(model, folder / name)
    return folder / name


def saved_in_shards(folder: Path, model: Model) -> Path:
    """Every third tensor in one of three shards, and the index."""
    places = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(model)}
    for shard in set(places.values()):
        saved(folder, {name: model[name] for name in model if places[name] == shard}, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def saved_by_torch(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "model.pt", **options)
    return folder / "model.pt"


FORMS: dict[str, Callable[[Path, Model], Any]] = {
    "state-dict": lambda folder, model: model,
    "safetensors": saved,
    "safetensors-as-text": lambda folder, model: str(saved(folder, model)),
    "shards": saved_in_shards,
    "folder-of-one": lambda folder, model: saved(folder, model).parent,
    "folder-of-shards": lambda folder, model: saved_in_shards(folder, model).parent,
    "torch-zip": saved_by_torch,
    "torch-legacy": lambda folder, model: saved_by_torch(folder, model, _use_new_zipfile_serialization=False),
    "torch-wrapped": lambda folder, model: saved_by_torch(
        folder, {"state_dict": {f"module.{name}": tensor for name, tensor in model.items()}, "epoch": 3}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_holds_the_same_tensors(tmp_path: Path, form: str) -> None:
    model = random_model(0)
    source = open_source(FORMS[form](tmp_path, model))

    assert equal(read_all(source), model)
    for name, tensor in model.items():
        assert source.specs[name].shape == tuple(tensor.shape)
        assert source.specs[name].dtype == tensor.dtype
        assert source.specs[name].elements == tensor.numel()
        flat = tensor.flatten()
        for start, stop in ((0, 0), (0, 2), (1, 4), (3, None)):
            assert torch.equal(source.read(name, start, stop), flat[start:stop])


def test_a_module_is_its_state_dict() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    source = open_source(module)

    assert equal(read_all(source), module.state_dict())
    assert not source.read("0.weight").requires_grad


def test_tensors_in_another_memory_layout_are_read_in_row_major_order() -> None:
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)

    assert torch.equal(open_source({"w": tensor}).read("w", 5, 9), torch.arange(5.0, 9))


def test_a_source_is_taken_as_it_is(base: Model) -> None:
    source = open_source(base)

    assert open_source(source) is source


def test_models_are_called_by_their_number_and_files_as_they_were_given(tmp_path: Path, base: Model) -> None:
    path = saved(tmp_path, base)

    labels = [source.label for source in open_sources([base, path, tmp_path])]
    assert labels == ["model 1", str(path), str(tmp_path)]


def test_a_model_of_the_hub_is_downloaded(
    tmp_path: Path, base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_in_shards(tmp_path, base)
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_source("owner/some-model.v1")

    assert asked == ["owner/some-model.v1"]
    assert source.label == "owner/some-model.v1"
    assert equal(read_all(source), base)


def test_what_the_hub_does_not_have_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise OSError("404: no such repository\nmany more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(MergeError) as raised:
        open_source("owner/nothing")

    assert (
        str(raised.value) == "owner/nothing is neither a file nor found on the hub: 404: no such repository"
    )


@pytest.mark.parametrize(
    "name", ["folder/model.safetensors", "folder/model.pt", "/owner/model", "a/b/c", "model"]
)
def test_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *what, **options: pytest.fail("asked"))

    with pytest.raises(MergeError, match="there is no such file; give the path of a checkpoint"):
        open_source(name)


# Damage


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, base: Model) -> None:
    path = saved(tmp_path, base)
    whole = path.read_bytes()

    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DeltapatchError, match=r"model\.safetensors is truncated or no safetensors file"):
            open_source(path)


def test_a_file_that_shrinks_while_it_is_read_is_told_with_the_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(1000), "b": torch.ones(1000)})
    source = open_source(path)
    os.truncate(path, path.stat().st_size - 100)

    assert torch.equal(source.read("a"), torch.ones(1000))
    assert torch.equal(source.read("b", 0, 900), torch.ones(900))
    with pytest.raises(MergeError, match=r"model\.safetensors became shorter while 'b' was read"):
        source.read("b")


def test_a_file_that_is_replaced_while_it_is_read_stays_the_old_one(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(10)})
    source = open_source(path)
    os.replace(saved(tmp_path, {"other": torch.zeros(100), "w": torch.zeros(10)}, "new.safetensors"), path)

    assert torch.equal(source.read("w"), torch.ones(10))


def test_a_shard_without_a_tensor_is_refused(tmp_path: Path, base: Model) -> None:
    index = saved_in_shards(tmp_path, base)
    saved(tmp_path, {"other": torch.ones(1)}, "model-1.safetensors")

    with pytest.raises(
        DeltapatchError, match=r"shard model-1\.safetensors lacks tensor '.+'; download it again"
    ):
        open_source(index)


def test_a_shard_that_is_missing_or_cut_off_is_refused(tmp_path: Path, base: Model) -> None:
    index = saved_in_shards(tmp_path, base)
    shard = tmp_path / "model-2.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(DeltapatchError, match=r"model-2\.safetensors is truncated"):
        open_source(index)

    shard.unlink()
    with pytest.raises(DeltapatchError, match=r"model-2\.safetensors"):
        open_source(index)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 3}}', "\ufeff", '{"weight_map": null}'],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)

    with pytest.raises(DeltapatchError, match=r"index\.json is no index of shards"):
        open_source(index)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, base: Model) -> None:
    (tmp_path / "inner").mkdir()
    saved(tmp_path, {"w": torch.ones(1)}, "secret.safetensors")
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))

    with pytest.raises(DeltapatchError, match=r"inner/secret\.safetensors"):
        open_source(index)


def test_a_folder_has_to_say_which_file_is_meant(tmp_path: Path, base: Model) -> None:
    with pytest.raises(MergeError, match="holds no safetensors file"):
        open_source(tmp_path)
    saved(tmp_path, base, "a.safetensors")
    saved(tmp_path, base, "b.safetensors")
    with pytest.raises(MergeError, match="holds 2 safetensors files and no index"):
        open_source(tmp_path)
    (tmp_path / "a.safetensors.index.json").write_text("{}")
    (tmp_path / "b.safetensors.index.json").write_text("{}")
    with pytest.raises(MergeError, match="holds 2 indexes of shards"):
        open_source(tmp_path)


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved_by_torch(tmp_path, {"w": Hostile()})

    with pytest.raises(MergeError, match=r"model\.pt: neither safetensors nor a plain torch checkpoint"):
        open_source(path)
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_that_is_damaged_or_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for content in (b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(MergeError, match=r"model\.pt: neither safetensors nor a plain torch checkpoint"):
            open_source(path)

    with pytest.raises(DeltapatchError, match="does not hold a state dict"):
        open_source(saved_by_torch(tmp_path, {"lr": 0.1}))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (3, "model 1: 'w' is a int, no tensor"),
        (
            torch.ones(2, 2).to_sparse(),
            r"model 1: tensor 'w' has no plain values \(torch.float32, torch.sparse",
        ),
        (torch.ones(2, device="meta"), r"model 1: tensor 'w' has no plain values .*meta"),
    ],
)
def test_an_entry_without_values_is_refused_by_name(entry: Any, reason: str) -> None:
    with pytest.raises(MergeError, match=reason):
        open_sources([{"w": entry}])


def test_one_model_where_a_list_belongs_is_refused(base: Model) -> None:
    for one in ("model.safetensors", Path("model.safetensors"), base, nn.Linear(2, 2)):
        with pytest.raises(MergeError, match="one model was given where a list of models belongs"):
            open_sources(one)  # type: ignore[arg-type]
