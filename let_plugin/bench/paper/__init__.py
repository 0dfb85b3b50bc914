"""Students of the paper's sizes, for runs on 32 accelerators: `docs/paper_scale.md`."""
