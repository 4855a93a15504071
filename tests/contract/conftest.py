"""Every registered method on every family: bases and patches are made once and shared, since no test may
change them.
"""

from typing import Any

import pytest
from families import FAMILIES, make_base
from subjects import Subject, patch_or_skip

from deltapatch.method import Method, make_method, registered_methods
from deltapatch.patch import Patch


@pytest.fixture(scope="session", params=FAMILIES)
def subject(request: Any) -> Subject:
    return Subject.of(make_base(FAMILIES[request.param]))


@pytest.fixture(scope="session")
def resnet18() -> Subject:
    return Subject.of(make_base(FAMILIES["resnet18"]))


@pytest.fixture(scope="session", params=registered_methods())
def method(request: Any) -> Method:
    return make_method(request.param)


@pytest.fixture(scope="session")
def patch(subject: Subject, method: Method) -> Patch:
    return patch_or_skip(subject, method)


@pytest.fixture(scope="session")
def resnet18_patch(resnet18: Subject, method: Method) -> Patch:
    return patch_or_skip(resnet18, method)
