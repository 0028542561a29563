"""Cards: metadata that the Hub takes, code that runs, and nothing that is not known."""

import ast
import dataclasses
import doctest
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from bt_hf.hub import cards
from bt_hf.hub.cards import eval_result, render_card, template_folder
from bt_hf.hub.contract import hub_id
from bt_hf.hub.facts import versions
from bt_hf.reward.card import reward_facts
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.reward.trainer import BradleyTerryTrainer
from tiny_models import picture, red_pairs, save

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def make(folder: Path, pairs: object = None, **options: object) -> BradleyTerryTrainer:
    """An untrained trainer, without pairs by default."""
    options = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True, "report_to": "none", **options}
    base = save(folder / "tiny-clip")
    return BradleyTerryTrainer(base, BradleyTerryConfig(str(folder / "my-taste"), **options), pairs)


def card_of(trainer: BradleyTerryTrainer, folder: Path) -> ModelCard:
    trainer.write_card(folder)
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> BradleyTerryTrainer:
    folder = tmp_path_factory.mktemp("cards")
    args = BradleyTerryConfig(str(folder / "my-taste"), max_steps=2, disable_tqdm=True, use_cpu=True, report_to="none")
    held_out = red_pairs(6, seed=1)
    trainer = BradleyTerryTrainer(save(folder / "tiny-clip"), args, red_pairs(8), held_out)
    trainer.train()
    trainer.evaluate()
    trainer.verdict = "Better than the base."
    trainer.save_model()
    return trainer


def test_card_says_what_is_known(trained: BradleyTerryTrainer) -> None:
    card = ModelCard.load(Path(trained.args.output_dir) / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.tags == ["bt_hf", "clip", "preference", "reward-model", "bradley-terry", "lora"]
    accuracy, log_loss = card.data.eval_results
    logged = next(entry for entry in reversed(trained.state.log_history) if "eval_accuracy" in entry)
    assert accuracy.metric_value == pytest.approx(logged["eval_accuracy"], abs=1e-4)
    assert accuracy.metric_args["low_95"] == pytest.approx(logged["eval_accuracy_low"], abs=1e-4)
    assert log_loss.metric_args["base"] == pytest.approx(logged["eval_base_log_loss"], abs=1e-4)
    for fact in ("on 8 pairs", "6 held-out pairs", "Better than the base.", "- steps: 2", "- seed: 42", "- rank: 8"):
        assert fact in card.text
    assert "`text_projection`, `visual_projection`" in card.text
    assert "- epochs" not in card.text  # `max_steps` decides


def test_card_keeps_local_paths_private(trained: BradleyTerryTrainer) -> None:
    card = ModelCard.load(Path(trained.args.output_dir) / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "tiny-clip" in card.text
    assert str(Path(trained.args.output_dir).parent) not in card.content


def test_code_of_the_card_runs(trained: BradleyTerryTrainer, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(Path(trained.args.output_dir).parent)
    monkeypatch.setattr("PIL.Image.open", lambda path: picture((220, 40, 40) if path == "first.png" else (0, 0, 220)))
    monkeypatch.setattr(PreferenceScorer, "embed_images", _embed_pictures(PreferenceScorer.embed_images))
    ours, plain = CODE.findall((Path("my-taste") / "README.md").read_text())
    exec(ours.replace("path/to/tiny-clip", "tiny-clip"), {})
    compared = float(capsys.readouterr().out.splitlines()[0])
    exec(plain.replace("path/to/tiny-clip", "tiny-clip"), {})
    assert float(capsys.readouterr().out) == pytest.approx(compared, abs=1e-5)


def _embed_pictures(embed_images):
    pictures = {"first.png": picture((220, 40, 40)), "second.png": picture((0, 0, 220))}
    return lambda self, images, batch_size=None: embed_images(self, [pictures[image] for image in images], batch_size)


def test_card_of_a_hub_model_names_it(trained: BradleyTerryTrainer, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(trained.model.get_base_model(), "name_or_path", "openai/clip-vit-base-patch32")
    monkeypatch.setattr(trained.args, "hub_model_id", "me/my-taste")
    card = card_of(trained, tmp_path)
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert 'PreferenceScorer.from_pretrained("me/my-taste")' in card.text
    assert "path/to" not in card.text


@pytest.mark.parametrize(
    ("pairs", "logged"),
    [
        (None, []),
        (red_pairs(4), []),
        (red_pairs(4).to_iterable_dataset(), [{"loss": 1.0, "step": 1}]),
        (None, [{"eval_accuracy": 1.0, "eval_base_accuracy": 1.0}]),
    ],
    ids=["no pairs", "untrained", "a stream", "an evaluation without intervals"],
)
@pytest.mark.parametrize("full_finetuning", [False, True], ids=["adapter", "whole"])
def test_card_without_facts_makes_nothing_up(pairs, logged, full_finetuning, tmp_path) -> None:
    trainer = make(tmp_path, pairs, full_finetuning=full_finetuning)
    trainer.state.log_history = logged
    card = card_of(trainer, tmp_path)
    assert card.data.eval_results is None
    assert not re.search(r"More Information|None|nan|\{\{|\}\}|\n\n\n", card.content)
    assert "How good it is" not in card.text
    for code in CODE.findall(card.text):
        ast.parse(code)


def test_several_evaluations_have_a_table_each(tmp_path) -> None:
    entry = {}
    for name in ("eval_base_", "eval_mine_", "eval_mine_base_", "eval_yours_", "eval_yours_base_"):
        entry |= {name + key: 0.5 for key in ("accuracy", "accuracy_low", "accuracy_high", "log_loss")}
    trainer = make(tmp_path)
    trainer.state.log_history = [{}, entry]
    card = card_of(trainer, tmp_path)
    assert [result.dataset_name for result in card.data.eval_results][::2] == [
        "the held-out pairs mine",
        "the held-out pairs yours",
    ]
    assert card.text.count("| this model | 0.500 | 0.500 to 0.500 | 0.500 |") == 2


def test_renamed_attribute_raises(trained: BradleyTerryTrainer, monkeypatch, tmp_path) -> None:
    monkeypatch.delattr(trained, "verdict")
    with pytest.raises(AttributeError, match="verdict"):
        card_of(trained, tmp_path)


def test_render_card_reads_its_metadata_back(trained: BradleyTerryTrainer) -> None:
    data = ModelCardData(
        library_name="peft",
        model_name="it's: a name",
        eval_results=[eval_result("pairs", "accuracy", "Accuracy", 0.5)],
    )
    facts = dataclasses.replace(reward_facts(trained, trained.args, None), name="it's: a name")
    card = render_card("reward_adapter.md", facts, data)
    assert card.data.model_name == "it's: a name"
    assert card.data.eval_results == data.eval_results
    assert "# it's: a name" in card.text


def test_example_runs() -> None:
    assert doctest.testmod(cards) == (0, 3)


def test_hub_id_is_no_path(tmp_path) -> None:
    assert hub_id("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert hub_id(str(tmp_path)) is None
    assert hub_id("examples/emoji/clip") is None


def test_templates_and_versions_are_found() -> None:
    assert (template_folder() / "reward_adapter.md").is_file()
    found = versions(["torch", "no-such-library"])
    assert list(found) == ["bt-hf", "torch"]


def test_card_of_a_whole_model_has_no_facts_of_a_lora(tmp_path) -> None:
    trainer = make(tmp_path, full_finetuning=True, kl_weight=0.7)
    trainer.verdict = "Worse."
    text = card_of(trainer, tmp_path).text
    assert "- weight of the KL term: 0.7" in text
    assert not re.search("warm start|prior", text)


def test_caption_says_which_pairs_the_diagram_is_of(trained: BradleyTerryTrainer, tmp_path) -> None:
    (tmp_path / "reliability.png").touch()
    assert "for how sure it is, on 6 held-out pairs." in card_of(trained, tmp_path).text
    other = make(tmp_path)
    other.verdict = "Worse."
    assert "for how sure it is, in the cross-validation." in card_of(other, tmp_path).text


def test_a_folder_that_is_saved_again_keeps_its_pictures(trained: BradleyTerryTrainer, tmp_path) -> None:
    trained.save_model(str(tmp_path))
    (tmp_path / "reliability.png").write_bytes(b"a picture")
    trained.save_model(str(tmp_path))
    assert "](reliability.png)" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "reliability.png").read_bytes() == b"a picture"
