# On a fresh machine with Python 3.11 and make: `make demo` or `make test`, set-up included.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
# where this run's demo goes
DEMO ?= runs/demo
# one BLAS thread a process: two lessons side by side on two cores are three times slower with two each
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# cells in their order, so no pytest-randomly
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=180 --nbval-sanitize-with lessons/nbval.cfg -p no:cacheprovider -p no:randomly

.PHONY: help setup demo test test-unit test-lessons lint lab lessons samples certificates picture benchmarks clean

help:
	@echo "make demo          train a tiny tracker, score it, write the video (about 6 minutes, set-up included)"
	@echo "make test          lint, all tests, and the lessons (test-unit, test-lessons: one of them)"
	@echo "make lint          layout (100 columns), ruff's rules, and who may import whom; seconds"
	@echo "make lab           JupyterLab in lessons/"
	@echo "make lessons       run the lessons anew and store their outputs"
	@echo "make samples       make data_samples anew, byte for byte"
	@echo "make certificates  measure the agreement with the authors' code anew: docs/certificates.md"
	@echo "make picture       draw the picture of the README anew"
	@echo "make benchmarks    the ratios that the project promises"
	@echo "make clean         remove the environment and what was made by demo"

$(VENV)/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[test]'
	@touch $@
	@echo "trackkit is $(VENV)/bin/trackkit; to type trackkit alone: source $(VENV)/bin/activate"

setup: $(VENV)/ready

demo: setup
	$(RUN) -m trackkit train siamfc-tiny --scale laptop --out $(DEMO) --workers 1
	$(ONE_THREAD) $(RUN) -m trackkit evaluate $(DEMO)/tracker.safetensors ncc stay --out $(DEMO)/results --json $(DEMO)/scores.json
	$(ONE_THREAD) $(RUN) -m trackkit track data_samples/val/synth_val_rotation --tracker $(DEMO)/tracker.safetensors --out $(DEMO)
	@echo "open $(DEMO)/synth_val_rotation-demo.mp4"

test: lint test-unit test-lessons

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

test-unit: setup
	$(ONE_THREAD) $(RUN) -m pytest -q -n 2 tests

test-lessons: setup
	$(RUN) -c "from trackkit.synth.pool import pool; pool()"
	$(ONE_THREAD) TRACKKIT_SCALE=tiny $(RUN) -m pytest -q $(NBVAL) -n 2 --dist loadfile lessons

lab: setup
	$(RUN) -m jupyter lab --notebook-dir=lessons

lessons: setup
	$(RUN) -c "from trackkit.synth.pool import pool; pool()"
	$(ONE_THREAD) TRACKKIT_SCALE=tiny $(RUN) -m trackkit lessons build lessons/*.ipynb

samples: setup
	rm -rf data_samples/train data_samples/val data_samples/test
	$(RUN) -m trackkit synth --samples data_samples

certificates: setup
	$(ONE_THREAD) $(RUN) tests/certificates.py

picture: setup
	$(RUN) docs/picture.py

benchmarks: setup
	$(RUN) benchmarks/demo_margin.py
	$(RUN) benchmarks/sampling_speed.py
	$(RUN) benchmarks/tiny_steps.py
	$(ONE_THREAD) $(RUN) benchmarks/limits.py
	for tracker in stark sbt procontext ustam dastm; do $(ONE_THREAD) $(RUN) benchmarks/$${tracker}_speed.py || exit 1; done

clean:
	rm -rf $(VENV) runs build *.egg-info
