"""The command line: `main` has the commands, `console` what they show, `doctor` and `picture` what two of them do."""
