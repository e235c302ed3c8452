"""The commands besides `train`: evaluate, predict, report, export, lab, sheet, config, doctor."""

__all__ = ["config", "doctor", "evaluate", "export", "installation", "lab", "predict", "report", "sheet"]
