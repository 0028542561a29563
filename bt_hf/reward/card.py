def write_reward_card(folder, trainer):
    (folder / "README.md").write_text("x")
