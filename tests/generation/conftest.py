"""The networks of the generation tests, built once."""

import pytest
from generation_cases import GQA, MLA, build_case


@pytest.fixture(scope="session")
def mla():
    return build_case(MLA)


@pytest.fixture(scope="session")
def gqa():
    return build_case(GQA)


@pytest.fixture(scope="session", params=["mla", "gqa"])
def case(request):
    return request.getfixturevalue(request.param)
