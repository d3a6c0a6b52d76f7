# esm-ledger: every task is a target. `make` prints them.
#
# Variables, with the same meaning everywhere (all optional):
#   MODEL   a released name in full, facebook/NAME of the Hugging Face Hub, or the path of weights
#   INPUT   the FASTA file; or several, a folder of them, - for standard input
#   OUTPUT  the folder that gets a folder for every run; with RUN=: where the run's folder lies now
#   RUN     the number of a run
#   LABEL   what history calls the run
#   RAY     auto, or HOST:PORT of a Ray cluster (docs/cluster.md)
#   FORMAT  hdf5, esm-extract, npy, virnucpro, anndata, csv or dataset
#   TO      where to write
#   QUERY   the number of a run, or a FASTA file
#   CONFIG  the settings file, instead of config.ini
#   ARGS    any further arguments of the script, as typed in a shell
# A target refuses those that it does not take, if they stand on the command line.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
PYTHON ?= python3
venv := .venv
python := $(venv)/bin/python
installed := $(venv)/.installed
installed_dev := $(venv)/.installed-dev
pip_install := $(python) -m pip install --disable-pip-version-check --constraint constraints.txt

# FASTA headers are UTF-8 whatever the locale says.
export PYTHONUTF8 := 1

# Which variables each target takes; the help shows this table.
takes.help              :=
takes.setup             := RAY
takes.detect            := MODEL CONFIG ARGS
takes.download          := MODEL CONFIG ARGS
takes.validate          := MODEL INPUT OUTPUT RUN CONFIG ARGS
takes.verify            := MODEL INPUT OUTPUT RUN CONFIG ARGS
takes.embed             := MODEL INPUT OUTPUT LABEL RAY CONFIG ARGS
takes.resume            := MODEL INPUT OUTPUT RUN RAY CONFIG ARGS
takes.history           := RUN CONFIG ARGS
takes.query             := CONFIG ARGS
takes.browse            := CONFIG ARGS
takes.backup            := TO CONFIG ARGS
takes.upgrade           := CONFIG ARGS
takes.export            := RUN OUTPUT FORMAT TO CONFIG ARGS
takes.neighbours        := MODEL OUTPUT RUN QUERY TO CONFIG ARGS
takes.crate             := RUN OUTPUT TO CONFIG ARGS
takes.report            := RUN OUTPUT TO CONFIG ARGS
takes.prune             := RUN OUTPUT CONFIG ARGS
takes.rebuild           := OUTPUT CONFIG ARGS
takes.relocate          := RUN OUTPUT CONFIG ARGS
takes.model             := CONFIG ARGS
takes.demo              := OUTPUT CONFIG
takes.test              := ARGS
takes.torture           := ARGS
takes.lint              :=
takes.clean             :=
takes.benchmark         := ARGS
takes.benchmark-cuda    := CONFIG ARGS
takes.benchmark-loading := ARGS

# `make embed RUN=1` would begin a new run without a word. Of several targets each may have variables
# of its own. Variables of the environment are not checked, and a target that is a file has no line above.
variables := MODEL INPUT OUTPUT RUN LABEL RAY FORMAT TO QUERY CONFIG ARGS
given := $(foreach name,$(variables),$(if $(findstring command line,$(origin $(name))),$(name)))
goals := $(or $(MAKECMDGOALS),help)
taken := $(foreach goal,$(goals),$(if $(filter undefined,$(origin takes.$(goal))),$(variables),$(takes.$(goal))))
refused := $(firstword $(filter-out $(taken),$(given)))
ifneq ($(refused),)
$(error $(refused)= is not a variable of $(goals) ($(or $(strip $(taken)),it has none)))
endif

# `make embed model=FILE` would silently use another model.
upper = $(shell echo '$(1)' | tr a-z A-Z)
$(foreach name,model input output run label ray format to query config args,\
  $(if $(findstring command line,$(origin $(name))),\
    $(error $(name)= is not a variable, $(call upper,$(name))= is)))

# Values reach the scripts through the environment, not through the text of a recipe: blanks,
# quotes, `%` and `$` in a path stay what they are. By itself make would export the variables of the
# command line, too, and expand them: `$(shell ...)` in a path would be run.
unexport $(variables)
export esm_model := $(value MODEL)
export esm_input := $(value INPUT)
export esm_output := $(value OUTPUT)
export esm_run := $(value RUN)
export esm_label := $(value LABEL)
export esm_ray := $(value RAY)
export esm_config := $(value CONFIG)
export esm_format := $(value FORMAT)
export esm_to := $(value TO)
export esm_query := $(value QUERY)
model := $${esm_model:+--esm-model="$$esm_model"}
# As in config.ini: a path, or words that each name one.
input := $${esm_input:+--set "input.fasta=$$esm_input"}
output := $${esm_output:+--output="$$esm_output"}
run := $${esm_run:+--run="$$esm_run"}
label := $${esm_label:+--label="$$esm_label"}
ray := $${esm_ray:+--ray="$$esm_ray"}
# What computes on a cluster needs Ray, and so does every machine of the cluster.
cluster := $(if $(value RAY),$(venv)/.installed-cluster)
config := $${esm_config:+--config="$$esm_config"}
format := $${esm_format:+--format="$$esm_format"}
to := $${esm_to:+--to="$$esm_to"}
query := $${esm_query:+--query="$$esm_query"}

demo_model := models/esm2_untrained_t6_8M.pt

.PHONY: help
help: ## print every target
	@echo "make TARGET VARIABLE=VALUE... (each target with its variables)"
	@awk -F ' *:= *|:[^#]*## ' '/^takes\./ { takes[substr($$1, 7)] = $$2 } \
	  /^[a-z-]+:.*## / { printf "  %-20s%s\n", $$1, $$2; if (takes[$$1]) printf "%24s%s\n", "", takes[$$1] }' Makefile

.PHONY: setup
setup: $(installed) $(cluster) ## install what the scripts need, pinned, into .venv; with RAY= also Ray

$(installed): pyproject.toml constraints.txt $(wildcard lib/network/fused*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 13) and f"Python {v[0]}.{v[1]}: 3.11 to 3.13 is needed (make PYTHON=python3.12)")'
	@echo "$(venv): a Python with the packages of pyproject.toml at the versions of constraints.txt."
	@echo "With torch's CPU build these are 1.2 GB on disk, with CUDA more; pip shows the size of each."
	$(PYTHON) -m venv $(venv)
	$(pip_install) --editable '.[export]'
	@$(python) scripts/kernel.py || echo "attention is computed by torch's operations instead."
	@du -sh $(venv)
	@touch $@

# The tests, the linters and the torture need everything that any target needs.
$(installed_dev): $(installed)
	$(pip_install) --editable '.[dev]'
	@touch $@ $(venv)/.installed-browse $(venv)/.installed-benchmark $(venv)/.installed-cluster

.PHONY: detect
detect: $(installed) ## print a model's properties and where each came from
	@$(python) scripts/detect.py $(config) $(model) $(ARGS)

.PHONY: download
download: $(installed) ## download the released MODEL=, and embed nothing
	@$(python) scripts/download.py $(config) $(model) $(ARGS)

.PHONY: validate
validate: $(installed) ## check settings, model, input and database; with RUN= audit a run
	@$(python) scripts/validate.py $(config) $(model) $(input) $(output) $(run) $(ARGS)

.PHONY: verify
verify: $(installed) ## compute a sample of RUN= again with the model's own library, and compare
	@$(python) scripts/verify.py $(config) $(model) $(input) $(output) $(run) $(ARGS)

.PHONY: embed
embed: $(installed) $(cluster) ## embed INPUT= with MODEL= as a run on the record
	@$(python) scripts/embed.py $(config) $(model) $(input) $(output) $(label) $(ray) $(ARGS)

.PHONY: resume
resume: $(installed) $(cluster) ## continue RUN=, or the newest unfinished run
	@$(python) scripts/resume.py $(config) $(model) $(input) $(output) $(run) $(ray) $(ARGS)

$(venv)/.installed-cluster: $(installed)
	$(pip_install) --editable '.[export,cluster]'
	@touch $@

.PHONY: history
history: $(installed) ## show all runs, newest first, or RUN=
	@$(python) scripts/history.py $(config) $(run) $(ARGS)

.PHONY: query
query: $(installed) ## ask the run database: make query ARGS='"select * from run_history"'
	@$(python) scripts/query.py $(config) $(ARGS)

.PHONY: browse
browse: $(venv)/.installed-browse ## show the run database in a web browser, read-only (this machine only)
	@$(python) scripts/browse.py $(config) $(ARGS)

$(venv)/.installed-browse: $(installed)
	$(pip_install) --editable '.[export,browse]'
	@touch $@

.PHONY: backup
backup: $(installed) ## copy the run database to TO=, while runs go on
	@$(python) scripts/backup.py $(config) $(to) $(ARGS)

.PHONY: upgrade
upgrade: $(installed) ## bring an older run database to this version, after a backup
	@$(python) scripts/upgrade.py $(config) $(ARGS)

.PHONY: export
export: $(installed) ## write RUN= in FORMAT= (hdf5, csv, dataset, npy...) TO=
	@$(python) scripts/export.py $(config) $(run) $(output) $(format) $(to) $(ARGS)

.PHONY: neighbours
neighbours: $(installed) ## nearest records in RUN= for each of QUERY= (a run or a FASTA file) TO=
	@$(python) scripts/neighbours.py $(config) $(run) $(output) $(query) $(to) $(model) $(ARGS)

.PHONY: crate
crate: $(installed) ## write RUN= with its provenance as a Process Run Crate (RO-Crate) TO=
	@$(python) scripts/crate.py $(config) $(run) $(output) $(to) $(ARGS)

.PHONY: report
report: $(installed) ## write RUN= as one page of HTML: facts, warnings, figures
	@$(python) scripts/report.py $(config) $(run) $(output) $(to) $(ARGS)

.PHONY: prune
prune: $(installed) ## take the files of RUN= off the disk, keep its history (ARGS=--dry-run: only say)
	@$(python) scripts/prune.py $(config) $(run) $(output) $(ARGS)

.PHONY: rebuild
rebuild: $(installed) ## make a lost run database anew from the files in OUTPUT=
	@$(python) scripts/rebuild.py $(config) $(output) $(ARGS)

.PHONY: relocate
relocate: $(installed) ## write down that the folder of RUN= lies in OUTPUT= now
	@$(python) scripts/relocate.py $(config) $(run) $(output) $(ARGS)

.PHONY: model
model: $(installed) ## write untrained weights: make model ARGS='--like esm2_t6_8M_UR50D --to FILE'
	@$(python) scripts/make_model.py $(config) $(ARGS)

# The file is always whole: it gets its name once it is written.
.PRECIOUS: $(demo_model)
$(demo_model): | $(installed)
	@$(python) scripts/make_model.py --like esm2_t6_8M_UR50D --to $@

.PHONY: demo
demo: $(installed) $(demo_model) ## validate and embed examples/proteins.fasta (untrained weights)
	@echo "Untrained weights: this shows how it works; the vectors mean nothing."
	@$(python) scripts/validate.py $(config) --esm-model $(demo_model) --input examples/proteins.fasta
	@$(python) scripts/embed.py $(config) --esm-model $(demo_model) --input examples/proteins.fasta $(output)
	@$(python) scripts/history.py $(config)
	@run=$$($(python) scripts/query.py $(config) --format csv 'select max(id) from runs' | tail -n 1); \
	  echo; \
	  echo "What to do next:"; \
	  echo "  make report RUN=$$run                    # the run as a page: facts, warnings, figures"; \
	  echo "  make export RUN=$$run FORMAT=npy TO=demo  # its vectors as a matrix, in a new folder"; \
	  echo "  make embed MODEL=esm2_t6_8M_UR50D INPUT=examples/proteins.fasta  # trained weights (30 MB)"

# One thread each, and none that waits actively: processes share the cores. Byte code is kept, whatever
# the environment says: many processes would compile the same modules again.
.PHONY: test
test: $(installed_dev) ## run the tests
	@unset PYTHONDONTWRITEBYTECODE; OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive $(python) -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup $(ARGS)

.PHONY: torture
torture: $(installed_dev) ## kill, starve and damage runs some 1,000 times; say what was tried and what was lost
	@$(python) -m tests.torture $(ARGS)

.PHONY: lint
lint: $(installed_dev) ## check style and types (ruff, mypy)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

.PHONY: clean
clean: ## remove caches and build leftovers; runs, models and .venv stay
	@for path in .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info; do \
	  if [ -d "$$path" ]; then rm -rf "$$path" && echo "removed $$path"; fi; \
	done
	@find benchmarks docs lib schema scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +
	@echo "removed __pycache__ of the program's folders"

# Only its own Python has esm.cpp: it needs a numpy before 2. ARGS='--without esm-cpp' makes none.
esm_cpp := .venv-esm-cpp

.PHONY: benchmark
benchmark: $(venv)/.installed-benchmark $(if $(findstring esm-cpp,$(ARGS)),,$(esm_cpp)/.installed) ## measure beside fair-esm, transformers, OpenVINO and esm.cpp (untrained weights)
	@$(python) scripts/benchmark.py $(ARGS)

$(esm_cpp)/.installed: benchmarks/esm_cpp.txt
	$(PYTHON) -m venv $(esm_cpp)
	$(esm_cpp)/bin/python -m pip install --disable-pip-version-check --requirement benchmarks/esm_cpp.txt
	@touch $@

$(venv)/.installed-benchmark: $(installed)
	$(pip_install) --editable '.[export,benchmark]'
	@touch $@

.PHONY: benchmark-cuda
benchmark-cuda: $(venv)/.installed-benchmark ## measure on a GPU, 8M to 3B, in three parts: ARGS='--part 1' (untrained weights)
	@$(python) -m benchmarks.cuda $(config) $(ARGS)

.PHONY: benchmark-loading
benchmark-loading: $(installed) ## time and memory of loading, beside fair-esm's loader (untrained 650M)
	@$(python) -m benchmarks.loading $(ARGS)
