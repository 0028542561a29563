"""A reward that `bt-hf reward` trained, once for all tests of the command line."""

import pytest

from bt_hf.cli import main
from command_line import BLUE, RED, Workplace
from tiny_models import picture, red_pairs, save


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("cli")
    model = save(folder / "base")
    red_pairs(12).save_to_disk(folder / "pairs")
    red_pairs(8, seed=1).save_to_disk(folder / "held-out")
    images = folder / "images"
    (images / "deeper").mkdir(parents=True)
    picture(RED).save(images / "red.png")
    picture(BLUE).save(images / "deeper" / "BLUE.JPG")
    (images / "notes.txt").write_text("not an image")
    config = folder / "taste.yaml"
    config.write_text(
        f"model: {model}\ndataset: {folder / 'pairs'}\neval_dataset: {folder / 'held-out'}\noutput_dir: nowhere\n"
        "num_train_epochs: 2\nlearning_rate: 1e-3\nlogging_steps: 1\ncross_validate: 2\n"
        "disable_tqdm: true\nuse_cpu: true\n"
    )
    out = folder / "reward"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values, **options: printed.append(" ".join(map(str, values))))
        assert main(["reward", f"--config={config}", "--output_dir", str(out), "--lora_r", "2"]) == 0
    return Workplace(model, str(folder / "pairs"), images, out, "\n".join(printed))
