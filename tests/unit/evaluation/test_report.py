import base64
import io
import itertools
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.report import Epoch, Example, SkipWeights, render_report, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page with their attributes and text; elements that are not closed fail."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data.replace("\u00a0", " ").replace("\u2060", "")

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def labels(self):
        return [element["aria-label"] for element in self.elements if "aria-label" in element]

    def text(self):
        return " ".join(self.all("body")[0]["text"].split())


@pytest.fixture
def render(make_report):
    return lambda **fields: Page(render_report(make_report(**fields)))


def test_the_page_says_the_result_in_words_first(render):
    paragraphs = [" ".join(paragraph["text"].split()) for paragraph in render().all("p")]
    assert paragraphs[0] == "On 5 test images the patch answers 80.0 % right (95 % interval 37.6–96.4)."
    assert paragraphs[1].startswith("A head alone answers 60.0 % right: a tie")


def test_validation_images_are_not_called_test_images(render):
    page = render(split="validation")
    assert "On 5 validation images the patch" in page.text()
    assert "test image" not in page.text()
    assert page.all("img")[0]["alt"] == "Validation image of the class c"


def test_a_patch_worse_than_the_head_alone_gets_a_warning(render, answers):
    labels = [0] * 20
    worse, better = answers(labels, [0] * 8 + [1] * 12), answers(labels, [0] * 18 + [1] * 2)
    warning = "The patch is worse than a head alone."
    assert warning in render(patch=worse, head_only=better).text()
    assert warning not in render(patch=better, head_only=worse).text()
    assert warning not in render().text()


def test_without_a_head_alone_the_page_compares_nothing(render):
    text = render(head_only=None).text()
    assert "head alone" not in text
    assert "On 5 test images" in text


def test_the_warnings_are_shown(render):
    assert "Warning: One image was unreadable." in render(warnings=("One image was unreadable.",)).text()


def test_the_facts_of_the_run_are_shown(render):
    page = render()
    facts = dict(
        zip([e["text"] for e in page.all("dt")], [e["text"].strip() for e in page.all("dd")], strict=True)
    )
    assert facts == {
        "base": "resnet18",
        "fingerprint of the base": "sha256:0123",
        "method": "delta, modules=1",
        "training images": "40",
        "seed": "7",
        "learned parameters": "1,234",
        "patch file": "5.0 kB",
        "time": "1 min 05 s",
        "torch": "2.15",
    }
    assert "The base is as it was." in page.text()


def test_names_from_files_cannot_become_markup(render, answers):
    hostile = "<script>alert(1)</script>\"'><img src=x>"
    patch = answers([0, 1, 2], [0, 1, 1])
    patch = type(patch)((hostile, "b", "c"), patch.labels, patch.probabilities)
    page = render(
        title=hostile,
        base=hostile,
        classes=patch.classes,
        data={hostile: hostile},
        patch=patch,
        head_only=None,
        warnings=(hostile,),
        examples=(Example(hostile, hostile, 0.5, hostile, Image.new("RGB", (9, 9))),),
    )
    assert page.all("script") == []
    assert [image["src"][:23] for image in page.all("img")] == ["data:image/jpeg;base64,"]
    assert page.all("h1")[0]["text"] == hostile
    assert page.all("img")[0]["alt"] == f"Test image of the class {hostile}"


def test_the_page_loads_nothing_from_outside_and_has_no_script(make_report, drawn):
    text = render_report(make_report(**drawn))
    assert not re.search(r"https?:|//|@import", re.sub(r"base64,[^\"]*", "", text))
    page = Page(text)
    assert page.all("script") + page.all("link") + page.all("iframe") == []
    for element in page.elements:
        assert not [name for name in element if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert element.get(name, "#").startswith(("#", "data:image/"))


def test_a_content_security_policy_forbids_what_the_page_does_not_need(render):
    policies = [meta["content"] for meta in render().all("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_every_table_has_a_caption_and_every_header_cell_a_scope(render, drawn):
    page = render(**drawn)
    assert len(page.all("caption")) == len(page.all("table")) == 4
    assert all(cell.get("scope") in {"row", "col"} for cell in page.all("th"))


def test_every_picture_has_words_that_stand_in_for_it(render, drawn):
    page = render(**drawn)
    drawings = [element for element in page.elements if element.get("role") == "img"]
    assert len(drawings) == len(page.all("svg")) == 2 + 2 + 3
    assert all(element["aria-label"] for element in drawings)
    assert all(image["alt"] for image in page.all("img"))


def test_the_page_has_one_main_part_and_named_sections(render, drawn):
    page = render(**drawn)
    ids = [element["id"] for element in page.elements if "id" in element]
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1, 1, 1, 1, 1]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        assert element.get("aria-labelledby", ids[0]) in ids
        if element["tag"] == "a":
            assert element["href"][1:] in ids
        if element["tag"] == "section":
            assert "aria-label" in element or "aria-labelledby" in element


def test_a_wide_table_can_be_scrolled_with_the_keyboard(render, drawn):
    scrolled = [element for element in render(**drawn).elements if element.get("class") == "scroll"]
    assert len(scrolled) == 4
    assert all(element["tabindex"] == "0" and element["role"] == "region" for element in scrolled)


def test_the_confusion_matrix_has_numbers_and_colours(render):
    cells = [cell for cell in render().all("td") if "--part" in cell.get("style", "")]
    assert [int(cell["text"]) for cell in cells] == [2, 0, 0, 0, 2, 0, 0, 1, 0]
    assert cells[0]["style"] == "--part: 1.00"
    assert (cells[0]["class"], cells[1]["class"]) == ("strong", "none")


def test_many_classes_get_the_most_confused_pairs_and_a_picture(render, answers):
    names = "abcdefghijklmnopqrstu"
    patch = answers(range(21), [*range(1, 21), 0], names)
    page = render(patch=patch, head_only=None, classes=patch.classes)
    table = next(table for table in page.all("table") if "most frequent confusions" in table["text"])
    rows = re.findall(r"^([a-u])([a-u])1\s1$", table["text"], flags=re.MULTILINE)
    assert rows == list(itertools.pairwise(names))[:15]
    assert "Confusion matrix of 21 classes" in " ".join(page.labels())
    assert "matrix" not in [table.get("class") for table in page.all("table")]


def test_the_classes_are_listed_the_weakest_first_and_absent_ones_last(render, answers):
    patch = answers([0, 0, 1], [0, 1, 1])
    page = render(patch=patch, head_only=None)
    table = next(table for table in page.all("table") if "Precision" in table["text"])
    assert re.findall(r"^([abc])\d", table["text"], flags=re.MULTILINE) == ["a", "b", "c"]
    assert "no images" in table["text"]
    assert "never answered" in table["text"]


def test_the_weakest_class_comes_first(render):
    table = next(table for table in render().all("table") if "Precision" in table["text"])
    assert re.findall(r"^([abc])\d", table["text"], flags=re.MULTILINE) == ["c", "a", "b"]
    assert "100.0 % (34.2–100.0)\n66.7 %" in table["text"]


def test_at_most_24_thumbnails_of_at_most_96_pixels_are_shown(render):
    big = Image.effect_noise((700, 500), 90).convert("RGBA")
    page = render(examples=(Example("a", "b", 0.9, "x.png", big),) * 30)
    assert len(page.all("img")) == 24
    for image in page.all("img"):
        decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert (decoded.format, decoded.size) == ("JPEG", (96, 69))


def test_a_small_thumbnail_is_not_enlarged_and_clear_pixels_are_white(render):
    page = render(examples=(Example("a", "b", 0.9, "x.png", Image.new("RGBA", (8, 6), (0, 0, 0, 0))),))
    decoded = Image.open(io.BytesIO(base64.b64decode(page.all("img")[0]["src"].split(",")[1])))
    assert decoded.size == (8, 6)
    assert decoded.getpixel((3, 3)) == (255, 255, 255)


def test_a_thumbnail_keeps_nothing_of_the_original_but_its_pixels(render):
    image = Image.new("RGB", (8, 8))
    image.info.update(comment=b"secret", exif=b"secret")
    page = render(examples=(Example("a", "b", 0.9, "x.png", image),))
    assert b"secret" not in base64.b64decode(page.all("img")[0]["src"].split(",")[1])


def test_the_epochs_are_drawn_and_listed(render, drawn):
    page = render(**drawn)
    assert any("training loss from 1.5 to 0.9 and validation loss" in label for label in page.labels())
    table = next(table for table in page.all("table") if "learning rate" in table["text"])
    assert "0.9000" in table["text"]
    assert "–" in table["text"]


def test_a_fit_without_validation_draws_only_training(render):
    page = render(history=(Epoch(1, 1.0, 0.5, None, None, 0.1, 1.0),))
    labels = " ".join(page.labels())
    assert "training loss from 1 to 1." in labels
    assert "validation" not in labels


def test_a_diverged_fit_can_still_be_reported(render):
    page = render(history=(Epoch(1, float("nan"), 0.5, float("inf"), 0.1, 0.1, 1.0),))
    assert "training loss from nan to nan and validation loss from inf to inf" in page.labels()[2]


def test_sections_without_content_are_left_out(render):
    page = render(examples=())
    headings = [heading["text"] for heading in page.all("h2")]
    assert headings == ["Figures", "Confusion", "Classes", "Facts of the run"]
    assert len(page.all("a")) == len(headings)
    assert page.all("svg") == []


def test_a_long_stage_is_drawn_as_a_heat_map_only(render, skip_weights):
    labels = render(skips=(skip_weights(13, classes=3),)).labels()
    assert not [label for label in labels if label.startswith("Arcs.")]
    assert len([label for label in labels if label.startswith("Heat map. Skip weights of layer4")]) == 1


def test_the_words_for_the_skips_name_the_largest_weight_first(render):
    n = np.nan
    mean, zero = np.array([[0.25, n], [0.75, 0.5]]), np.zeros((2, 2))
    weights = SkipWeights("layer1", 2, mean, zero, np.eye(2, dtype=bool), np.stack([mean] * 3))
    assert (
        "Arcs. Skip weights of layer1, the largest first: state 0 into sub-block 2 0.75 ± 0.00, "
        "state 1 into sub-block 2 0.50 ± 0.00, state 0 into sub-block 1 0.25 ± 0.00."
        in render(skips=(weights,)).labels()
    )


def test_skip_weights_by_class_leave_out_classes_without_images(render, skip_weights):
    weights = skip_weights(3)
    weights.per_class[1] = np.nan
    page = render(skips=(weights,))
    assert [figure["text"] for figure in page.all("figcaption")][-2:] == ["a", "c"]
    assert "2 of 3 classes" in page.text()


def test_skip_weights_by_class_are_cut_to_the_20_that_differ_most(render, answers, skip_weights):
    names = "abcdefghijklmnopqrstuv"
    patch = answers([0, 1], [0, 1], names)
    weights = skip_weights(1, classes=22)
    weights.per_class[:] = weights.mean + 0.1
    weights.per_class[[3, 7]] = weights.mean
    page = render(patch=patch, head_only=None, classes=patch.classes, skips=(weights,), examples=())
    shown = [caption["text"] for caption in page.all("figcaption")][-20:]
    assert "".join(shown) == names.replace("d", "").replace("h", "")
    assert "20 of 22 classes" in page.text()


def test_skip_weights_of_other_shapes_are_refused(skip_weights):
    good = skip_weights(3)
    with pytest.raises(DeltapatchError, match=r"layer4 .* give \(3, 3\) for 3 sub-blocks"):
        SkipWeights("layer4", 3, good.mean, good.spread[:2], good.existing, good.per_class)


def test_results_for_other_classes_are_refused(make_report, skip_weights):
    with pytest.raises(DeltapatchError, match=r"3 classes but shows results for \[3, 4\]"):
        make_report(skips=(skip_weights(2, classes=4),))


def test_a_head_alone_on_other_images_is_refused(make_report, answers):
    with pytest.raises(DeltapatchError, match="same split"):
        render_report(make_report(head_only=answers([0], [0])))


def test_the_written_file_is_the_rendered_page_and_replaces_an_old_one(make_report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(make_report(title="Größe 袋"), path)
    assert path.read_text("utf-8") == render_report(make_report(title="Größe 袋"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(make_report, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DeltapatchError, match=r"report\.html.*No space left on device"):
        write_report(make_report(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["missing/report.html", "file/report.html"])
def test_a_folder_that_does_not_exist_is_named(make_report, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(DeltapatchError, match=f"{place}: the report cannot be written"):
        write_report(make_report(), tmp_path / place)


def test_a_name_that_is_not_valid_unicode_does_not_stop_the_page(make_report, tmp_path):
    path = tmp_path / "report.html"
    write_report(make_report(title="caf\udce9"), path)
    assert "<h1>caf?</h1>" in path.read_text("utf-8")
