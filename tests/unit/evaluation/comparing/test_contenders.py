"""What ``--methods`` says becomes contenders and their variants."""

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.comparing.contenders import describe, parse_contenders
from deltapatch.method import registered_methods
from deltapatch.methods.compose import Compose
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head


def test_a_name_is_the_method_as_it_is_by_default() -> None:
    (head, delta) = parse_contenders("head, delta")
    assert (head.name, head.variants) == ("head", (Head(),))
    assert (delta.name, delta.variants) == ("delta", (Delta(),))


def test_values_and_options_make_every_combination_in_order() -> None:
    (contender,) = parse_contenders("delta:modules=1|all+start=identity|zero-gain")
    assert contender.variants == (
        Delta(modules=1, start="identity"),
        Delta(modules=1, start="zero-gain"),
        Delta(modules="all", start="identity"),
        Delta(modules="all", start="zero-gain"),
    )


def test_a_value_can_be_a_list_with_any_sign_in_it() -> None:
    text = 'head,compose:methods=["delta:modules=1+start=plain","norm"]|["norm","lora"]'
    (_, contender) = parse_contenders(text)
    lists = [variant.configuration()["methods"] for variant in contender.variants]
    assert lists == [("delta:modules=1+start=plain", "norm"), ("norm", "lora")]


def test_a_method_that_is_there_twice_is_called_by_what_was_written() -> None:
    names = [contender.name for contender in parse_contenders("delta:modules=1,delta:modules=2,head")]
    assert names == ["delta:modules=1", "delta:modules=2", "head"]


def test_all_is_every_registered_method() -> None:
    assert [contender.name for contender in parse_contenders("all")] == list(registered_methods())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "there is no method to compare"),
        ("nothing", "there is no method 'nothing'"),
        ("delta:modules", "method option 'modules' is not of the form KEY=VALUE"),
        ("delta:width=3", "method 'delta' has no option 'width'"),
        ("delta:modules=0", "modules must be 1 or more"),
        ("delta:modules=1+modules=2", "gives one option twice"),
        ("compose:methods=delta", 'methods takes a list, as in methods=["a","b"], not \'delta\''),
        ('compose:methods=["delta","x"]', "there is no method 'x'"),
        ("head,head", "head would be compared with itself"),
        ("delta:modules=1|1", "delta (modules=1) would be compared with itself"),
    ],
)
def test_a_list_that_cannot_be_compared_is_refused_by_its_reason(text: str, message: str) -> None:
    with pytest.raises(DeltapatchError) as caught:
        parse_contenders(text)
    assert message in str(caught.value)


def test_a_description_names_only_the_options_that_are_not_the_usual_ones() -> None:
    assert describe(Delta()) == "delta"
    assert describe(Delta(modules=2)) == "delta (modules=2)"
    assert describe(Compose(("norm", "lora:rank=4"))) == "compose (methods=[norm, lora:rank=4])"
