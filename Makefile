# Everything a fresh machine needs: `make demo` edits the sample clip, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test clean

# Installers talk to stderr, so that the last line on stdout is a command's own.
.venv/demo: requirements.txt
	@$(PYTHON) -m venv .venv >&2
	@$(BIN)/pip install -q -r requirements.txt >&2
	@touch $@

.venv/dev: .venv/demo requirements-dev.txt
	@$(BIN)/pip install -q -r requirements-dev.txt >&2
	@touch $@

# Until a trained checkpoint is shipped the demo runs on random weights: it shows that everything
# works, not what an edit looks like.
$(DEMO)/checkpoint: | .venv/demo
	@echo "no trained checkpoint here: building a tiny one of random weights, whose edits are noise" >&2
	@$(BIN)/python -m shapes.checkpoint $@ >&2

demo: .venv/demo $(DEMO)/checkpoint
	$(BIN)/python preprocess.py --data_path data/shapes.mp4 --model $(DEMO)/checkpoint \
		--inversion_prompt "a red striped circle on a green dotted background" \
		--H 128 --W 128 --n_frames 24 --steps 50 --save_steps 50 --save_dir $(DEMO)/latents
	$(BIN)/python run_tokenflow_pnp.py --data_path data/shapes.mp4 --model $(DEMO)/checkpoint \
		--prompt "a blue striped circle on a green dotted background" \
		--n_frames 24 --n_inversion_steps 50 --latents_path $(DEMO)/latents --output_path $(DEMO)

test: .venv/dev
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv $(DEMO)
