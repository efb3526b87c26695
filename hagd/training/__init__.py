"""What every training in this project shares: a resumable loader, progress, checkpoints and one `fit`."""
