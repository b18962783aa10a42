"""Names of what a run and its checkpoints hold, for those who look without computing."""

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
ADAPTER, WEIGHTS = "adapter", "weights"  # folders of trained weights: LoRA, or a full fine-tune
WEIGHTS_FILE, WEIGHTS_METADATA = "trained.safetensors", "metadata.json"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
TRAINER_STATE_FILE = "trainer_state.json"
EXPORT_REPORT = "export.json"
REPORT, SUMMARY = "report.json", "summary.json"
PAGE, DRYRUN_PAGE = "report.html", "dryrun.html"  # the second beside a run that lies there
MARKER = "run.json"
METRICS, CURVE = "metrics.jsonl", "curve.png"
NONFINITE = "nonfinite.jsonl"
VISUALDL_FILE = "visualdl/vdlrecords.run.log"  # one, always the same: its reader takes the newest of a folder only
SAMPLES = "samples"
