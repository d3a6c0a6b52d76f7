"""The console of every script: arguments, output, progress bars, exit statuses."""
