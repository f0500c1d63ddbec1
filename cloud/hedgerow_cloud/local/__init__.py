"""Everything on one machine: the daemons as child processes, the embedded broker, the simulated link."""
