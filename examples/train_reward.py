"""Train a reward on any preference pairs and any dual encoder, on one device or many.

    python examples/train_reward.py --model openai/clip-vit-base-patch32 --dataset my-clicks/ --output_dir my-taste
    accelerate launch --config_file examples/accelerate/multi_gpu.yaml examples/train_reward.py ...

`my-clicks/` is a folder with `metadata.csv` (columns prompt, chosen, rejected) and the images that it names; a Hub id
such as data-is-better-together/open-image-preferences-v1-binarized works as well. All options: --help.
`bt-hf reward` does the same and draws plots; this file shows the steps, to change them.
"""

from accelerate import PartialState
from trl import TrlParser

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, cross_validate
from bt_hf.cli.reward import RewardArguments


def main(argv: list[str] | None = None) -> None:
    # 1. Options: dataclasses, from the command line and from YAML (--config).
    parser = TrlParser((RewardArguments, BradleyTerryConfig), description=__doc__)
    parser.set_defaults(output_dir="my-taste")
    options, config = parser.parse_args_and_config(argv)
    # Fewer processes than meant? See accelerate/.
    PartialState().print(f"Processes: {config.world_size} on {config.device.type}")

    # 2. Pairs. Every known layout becomes rows of prompt, chosen, rejected; bad rows are found now, not in an hour.
    pairs, held_out = options.load_pairs()

    # 3. The verdict. Each pair is predicted by a model that saw neither it nor its prompt: what do these clicks prove?
    verdict = None
    if options.cross_validate:
        result = cross_validate(options.model, pairs, config, folds=options.cross_validate, seed=config.seed)
        verdict = result.verdict
        PartialState().print(result)

    # 4. Train on all pairs. --lora_r and its like describe the LoRA; another adapter (`peft_config`), metric, callback
    # or optimizer goes in here, as in any Trainer.
    trainer = BradleyTerryTrainer(options.model, config, train_dataset=pairs, eval_dataset=held_out)
    trainer.verdict = verdict  # for the card
    trainer.train()

    # 5. Save: a small adapter with a card. `PreferenceScorer.from_pretrained("my-taste")` uses it, and so does PEFT.
    trainer.save_model(config.output_dir)

    # 6. Evaluate, beside the untouched base, on pairs that were not trained on. The card then shows the figures.
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())
        trainer.create_model_card()
    PartialState().print(
        f"Saved to {config.output_dir}. Next: python examples/score_images.py {config.output_dir} ..."
    )


if __name__ == "__main__":
    main()
