"""Generation of text: prompts, options, samplers by name, the loop over rows, and playback of it."""
