"""Rows: equal budgets, their own folders and seeds, and stages that are shared only where nothing differs."""

import pytest

from aligntok.errors import UserError
from aligntok.runtime.files import write_folder
from aligntok.study.rows import ABLATIONS, COMPARED, NAMES, Row, borrow_stages, choose

FREE_OF_BUDGET = {"three_stages"}  # says that it sees more images


@pytest.mark.parametrize("name", NAMES)
def test_every_row_sees_the_same_number_of_images(name, tmp_path):
    row = Row(name, 3, tmp_path)
    recipe = row.recipe()
    if row.is_rival:
        seen, adversarial = recipe.rival.stage.steps, recipe.rival.stage.steps - recipe.rival.stage.gan_start
        batch = recipe.rival.training.batch_size
    else:
        stages = [recipe.tokenizer.stages.stage1, recipe.tokenizer.stages.stage2]
        stages = [stage for stage in stages if stage.steps]
        seen, adversarial = sum(s.steps for s in stages), sum(s.steps - s.gan_start for s in stages)
        batch = recipe.tokenizer.training.batch_size
        assert (recipe.tokenizer.stages.stage3.steps > 0) == (name in FREE_OF_BUDGET)
    assert (seen * batch, adversarial) == (320 * 16, 40)
    assert recipe.output == str(tmp_path / name / "seed-3") == str(row.folder)
    assert {recipe.tokenizer.training.seed, recipe.generator.training.seed, recipe.rival.training.seed} == {3}


def test_every_row_has_the_same_data_losses_and_generator(tmp_path):
    recipes = {name: Row(name, 0, tmp_path).recipe() for name in NAMES}
    base = recipes["aligntok"]
    for name, recipe in recipes.items():
        assert (recipe.data, recipe.generator) == (base.data, base.generator), name
        losses = recipe.rival.losses if Row(name, 0, tmp_path).is_rival else recipe.tokenizer.losses
        assert losses == base.tokenizer.losses, name
        if name in ("vae", "va_vae", "va_vae_vit"):
            assert recipe.rival.vae.networks == base.tokenizer.model.decoder, name


def test_rows_are_chosen_by_name_in_the_order_of_the_tables():
    assert choose(None) == [*COMPARED, *ABLATIONS]
    assert choose(["lora", "vae"]) == ["vae", "lora"]
    with pytest.raises(UserError, match=r"no row vea in the study; its rows are vae, va_vae"):
        choose(["vea"])


def _finish(row, stage):
    for part in ("discriminator", "tokenizer"):
        write_folder(row.folder / stage / part, {}, {"config": {"of": row.name, "stage": stage}})


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("w_sp_5", ["stage1"]),
        ("lora", ["stage1"]),  # the encoder's LoRA is not there yet in Stage 1
        ("three_stages", ["stage1", "stage2"]),
        ("aligntok_d16", []),
        ("random_encoder", []),
        ("stage1_only", []),  # another number of steps
    ],
)
def test_stages_are_borrowed_where_the_course_is_the_same(name, stages, tmp_path):
    given, row = Row("aligntok", 0, tmp_path), Row(name, 0, tmp_path)
    for stage in ("stage1", "stage2"):
        _finish(given, stage)
    borrow_stages(row, [given])
    found = sorted(path.parent.parent.name for path in row.folder.glob("*/tokenizer/config.json"))
    assert found == stages
    for stage in stages:
        assert (row.folder / stage / "discriminator" / "config.json").read_text() == (
            given.folder / stage / "discriminator" / "config.json"
        ).read_text()


def test_nothing_is_borrowed_from_another_seed(tmp_path):
    given, row = Row("aligntok", 1, tmp_path), Row("w_sp_5", 0, tmp_path)
    _finish(given, "stage1")
    borrow_stages(row, [given])
    assert not row.folder.exists()


@pytest.mark.parametrize("name", ["vae", "w_sp_5", "three_stages"])
def test_a_budget_multiplies_every_number_of_steps(name, tmp_path):
    plain, longer = (Row(name, 0, tmp_path, budget).recipe() for budget in (1, 5))
    for one, other in ((plain.rival.stage, longer.rival.stage), (plain.generator, longer.generator)):
        assert other.steps == 5 * one.steps
    assert longer.generator.snapshot_every == 5 * plain.generator.snapshot_every > 0
    assert longer.rival.stage.gan_start == 5 * plain.rival.stage.gan_start
    for stage in ("stage1", "stage2", "stage3"):
        one, other = (getattr(recipe.tokenizer.stages, stage) for recipe in (plain, longer))
        assert (other.steps, other.gan_start) == (5 * one.steps, 5 * one.gan_start)
