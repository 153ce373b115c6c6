# Everything a fresh machine needs: `make demo` edits the sample clip, `make test` runs the tests,
# and `make picture` makes the README's picture.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
CLIP := --data_path data/shapes.mp4 --model data/shapes-sd --n_frames 24
INVERT := $(BIN)/python preprocess.py $(CLIP) --H 128 --W 128 --save_dir $(DEMO)/latents \
	--inversion_prompt "a red striped circle on a green dotted background"
EDIT := $(BIN)/python run_tokenflow_pnp.py $(CLIP) --latents_path $(DEMO)/latents --output_path $(DEMO) \
	--prompt "a blue striped circle on a green dotted background"

.PHONY: demo picture test clean

# Installers write to stderr, so that the last line on stdout is the command's.
.venv/demo: requirements.txt
	@$(PYTHON) -m venv .venv >&2
	@$(BIN)/pip install -q -r requirements.txt >&2
	@touch $@

.venv/dev: .venv/demo requirements-dev.txt
	@$(BIN)/pip install -q -r requirements-dev.txt >&2
	@touch $@

demo: .venv/demo
	$(INVERT) --steps 50 --save_steps 50
	$(EDIT)

# The moving picture of README.md. The published algorithm gets the guidance and the negative prompt of this code, since the
# miniature knows no word of theirs, and 100 inversion steps, not 500.
PUBLISHED := $(EDIT) --config_path configs/published.yaml --n_inversion_steps 100 --guidance_scale 5 --negative_prompt ""
picture: demo
	$(INVERT) --steps 100 --save_steps 50 --inversion ddim --no_reconstruction true
	ours=$$($(EDIT)) && published=$$($(PUBLISHED)) && \
		$(BIN)/python -m benchmarks.picture data/demo.webp \
		"source=$(DEMO)/latents/sd_shapes-sd/shapes/steps_50/nframes_24/source" \
		"the published algorithm=$$(dirname $$published)/frames" "this code=$$(dirname $$ours)/frames"

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

clean:
	rm -rf .venv $(DEMO)
