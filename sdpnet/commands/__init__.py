"""The commands besides `train`: evaluate, predict, export, report, sheet, config, doctor."""
