# Everything a fresh machine needs: `make demo` edits the sample clip, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test clean

# Installers write to stderr, so that the last line on stdout is the command's.
.venv/demo: requirements.txt
	@$(PYTHON) -m venv .venv >&2
	@$(BIN)/pip install -q -r requirements.txt >&2
	@touch $@

.venv/dev: .venv/demo requirements-dev.txt
	@$(BIN)/pip install -q -r requirements-dev.txt >&2
	@touch $@

demo: .venv/demo
	$(BIN)/python preprocess.py --data_path data/shapes.mp4 --model data/shapes-sd \
		--inversion_prompt "a red striped circle on a green dotted background" \
		--H 128 --W 128 --n_frames 24 --steps 50 --save_steps 50 --save_dir $(DEMO)/latents
	$(BIN)/python run_tokenflow_pnp.py --data_path data/shapes.mp4 --model data/shapes-sd \
		--prompt "a blue striped circle on a green dotted background" \
		--n_frames 24 --n_inversion_steps 50 --latents_path $(DEMO)/latents --output_path $(DEMO)

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

clean:
	rm -rf .venv $(DEMO)
