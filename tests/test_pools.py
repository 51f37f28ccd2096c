"""Work pools by stage: whose is taken, and what is refused."""

from __future__ import annotations

import pytest
from test_recipe import TINY

from flows.pools import Pools
from flows.recipe import parse, read_recipe
from flows.rlhf import RlhfRecipe
from stages.errors import InputError
from stages.specs import STAGES


def test_a_stage_has_its_own_pool_else_the_default_else_none() -> None:
    assert [Pools().of(stage) for stage in STAGES] == [None] * len(STAGES)
    pools = Pools.model_validate({"default": "cpu", "ppo": "gpu", "sft": ""})
    assert {stage: pools.of(stage) for stage in STAGES} == dict.fromkeys(STAGES, "cpu") | {"ppo": "gpu"}
    assert Pools.model_validate({"default": "", "ppo": "gpu"}).of("sft") is None


def test_a_recipe_gives_pools_and_no_key_knows_them() -> None:
    plain = parse(RlhfRecipe, read_recipe(TINY), "x")
    recipe = parse(RlhfRecipe, read_recipe(TINY, ["pools.ppo=gpu"]), "x")
    assert recipe.pools.of("ppo") == "gpu"
    assert recipe.ppo is not None
    assert recipe.ppo == plain.ppo
    with pytest.raises(InputError, match=r"unknown key pools\.pppo; did you mean ppo\?"):
        parse(RlhfRecipe, read_recipe(TINY, ["pools.pppo=gpu"]), "x")
