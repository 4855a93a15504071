import pytest

from deltapatch.evaluation import wording
from deltapatch.evaluation.metrics import Interval, paired_difference


def plain(text):
    """The text without the characters that only steer line breaks."""
    return text.replace("\u00a0", " ").replace("\u2060", "")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (1_234_567, "1.2 MB"),
        (5_000_000_000, "5.0 GB"),
    ],
)
def test_a_file_size_is_given_in_the_largest_unit_that_fits(size, text):
    assert plain(wording.file_size(size)) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (59.99, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_a_duration_is_given_in_the_units_of_its_length(seconds, text):
    assert plain(wording.duration(seconds)) == text


@pytest.mark.parametrize(
    ("part", "text"), [(0.0214, "+2.1"), (-0.003, "\u22120.3"), (0.0004, "0.0"), (-0.0004, "0.0")]
)
def test_a_difference_has_a_sign_unless_it_rounds_to_nothing(part, text):
    assert wording.signed_points(part) == text


def test_a_name_ends_no_cell_of_a_table_and_begins_no_element():
    assert wording.markdown_cell("a | b\n<i>") == "a \\| b &lt;i>"


def test_a_part_is_given_in_percent_with_its_interval():
    assert plain(wording.with_interval(Interval(0.8734, 0.81, 0.9171))) == "87.3 % (81.0–91.7)"


def test_the_summary_names_the_images_and_the_interval(answers):
    sentence = plain(wording.summary(answers([0] * 10, [0] * 8 + [1] * 2), "test"))
    assert sentence == "On 10 test images the patch answers 80.0 % right (95 % interval 49.0–94.3)."


def test_the_summary_of_one_image_is_in_the_singular(answers):
    assert wording.summary(answers([0], [0]), "test").startswith("On 1 test image the patch")


@pytest.mark.parametrize(
    ("patch_right", "head_right", "outcome"),
    [
        (18, 8, "the patch is better by 50.0 percentage points (+21.1 to +69.8, p = 0.002)"),
        (8, 18, "the patch is worse by 50.0 percentage points (−69.8 to −21.1, p = 0.002)"),
        (
            9,
            8,
            "a tie, since a difference of 5.0 percentage points (−10.8 to +19.9, p = 1.000) can be chance",
        ),
    ],
)
def test_the_comparison_says_better_worse_or_tie(answers, patch_right, head_right, outcome):
    patch, head = (answers([0] * 20, [0] * right + [1] * (20 - right)) for right in (patch_right, head_right))
    sentence = plain(wording.comparison(head, paired_difference(patch, head)))
    assert sentence == f"A head alone answers {5 * head_right}.0 % right: {outcome}."


def test_a_figure_that_does_not_exist_has_no_row(answers):
    few, many = answers([0, 1], [0, 1]), answers([0, 1], [0, 1], "abcdef")
    assert "top-5 accuracy" not in [row.name for row in wording.figure_rows([few])]
    assert "top-5 accuracy" in [row.name for row in wording.figure_rows([many, many])]


def test_a_figure_has_one_value_for_each_model(answers):
    right, wrong = answers([0, 1], [0, 1]), answers([0, 1], [1, 0])
    accuracy = wording.figure_rows([right, wrong])[0]
    assert [plain(value).split(" (")[0] for value in accuracy.values] == ["100.0 %", "0.0 %"]
