"""Train a preference LoRA on any preference pairs and any diffusers pipeline, on one device or many.

    python examples/train_preference_lora.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset my-clicks/
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_preference_lora.py ...

`my-clicks/` is a folder with `metadata.csv` (columns prompt, chosen, rejected) and the images that it names; a Hub id
such as data-is-better-together/open-image-preferences-v1-binarized works as well. All options: --help.
`bt-hf lora` does the same and draws plots; this file shows the steps, to change them.
"""

from accelerate import PartialState
from trl import TrlParser

from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.cli.lora import LoraArguments


def main(argv: list[str] | None = None) -> None:
    # 1. Options: dataclasses, from the command line and from YAML (--config).
    parser = TrlParser((LoraArguments, PreferenceLoRAConfig), description=__doc__)
    parser.set_defaults(output_dir="my-taste-lora")
    options, config = parser.parse_args_and_config(argv)
    # Fewer processes than meant? See accelerate/.
    PartialState().print(f"Processes: {config.world_size} on {config.device.type}")

    # 2. Pairs. Every known layout becomes rows of prompt, chosen, rejected; bad rows are found now, not in an hour.
    # KTO alone takes each image by itself.
    pairs, held_out = options.load_pairs(unpaired=config.loss_type == "kto")

    # 3. The trainer. It encodes each image and prompt once, and then lets go of the encoders. --lora_r and its like
    # describe the LoRA; another one (`peft_config`), metric, callback or optimizer goes in here, as in any Trainer.
    trainer = PreferenceLoRATrainer(options.model, config, train_dataset=pairs, eval_dataset=held_out)

    # 4. Train. With --validation_prompts "a red apple" it also draws, before and after, from the same seeds.
    trainer.train()

    # 5. Save: one small folder, for diffusers (`load_lora_weights`) and for PEFT, with a card.
    trainer.save_model(config.output_dir)

    # 6. Evaluate: how often does the LoRA prefer what the person did, on pairs that were not trained on? The card then
    # shows the figures.
    if held_out is not None:
        trainer.log_metrics("eval", trainer.evaluate())
        trainer.create_model_card()
    PartialState().print(f'Saved. Next: pipeline.load_lora_weights("{config.output_dir}")')


if __name__ == "__main__":
    main()
