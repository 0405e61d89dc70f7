# Every target needs Python >= 3.10, make and a package index; everything else they install into .venv, .venv-label and
# .venv-peers
PYTHON ?= python3
VENV ?= .venv
LABEL_VENV ?= .venv-label
PEERS_VENV ?= .venv-peers
# One thread: the same result on every machine, and fast beside other programs (docs/performance.md). Where there are
# more, waiting ones sleep.
export OMP_WAIT_POLICY = PASSIVE
RUN = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python
DEMO = "['configs/train.yaml','configs/demo.yaml']"

ORGANS = bundles/organs
ORGANS_DEMO = '$(ORGANS)/configs/train.yaml','$(ORGANS)/configs/demo.yaml'
SYNTHESIS = bundles/synthesis
SYNTHESIS_DEMO = '$(SYNTHESIS)/configs/train.yaml','$(SYNTHESIS)/configs/demo.yaml'
WEIGHTS = 'configs/train.yaml','configs/weights.yaml'

.PHONY: demo organs-demo synthesis-demo staged weights gpu-bench test conformance docs-test label-env label-test clinic-test peers-env release lint clean

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.installed-extras: requirements-extras.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-extras.txt
	@touch $@

# MONAI Label imports torchvision and pydicom_seg, and our app calls neither: empty modules replace them
$(LABEL_VENV)/.installed: label_app/requirements.txt requirements.txt
	$(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_VENV)/bin/python -m pip install --quiet --requirement label_app/requirements.txt --constraint requirements.txt
	$(LABEL_VENV)/bin/python -m pip install --quiet --no-deps monailabel==0.8.5
	@$(LABEL_VENV)/bin/python -c 'import torchvision' 2>/dev/null || { \
	    site=$$($(LABEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision; \
	    mkdir -p $$site; : > $$site/__init__.py; echo 'make_grid = save_image = None' > $$site/utils.py; }
	@: > $$($(LABEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pydicom_seg.py
	@touch $@

# nnU-Net, for benchmarks/peers
$(PEERS_VENV)/.installed: benchmarks/peers/requirements.txt benchmarks/peers/requirements-nodeps.txt requirements.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt --constraint requirements.txt
	$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/requirements-nodeps.txt
	@touch $@

# a browser and an archive, from Debian unless the system has them
$(VENV)/.installed-clinic: acceptance/requirements.txt $(VENV)/.installed-extras
	$(VENV)/bin/python -m pip install --quiet --requirement acceptance/requirements.txt
	@{ command -v chromium && test -f /usr/share/orthanc/plugins/libOrthancDicomWeb.so; } >/dev/null || \
	    { apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends \
	    chromium fonts-dejavu-core orthanc orthanc-dicomweb >/dev/null; } || \
	    { echo 'install chromium, orthanc and orthanc-dicomweb'; exit 1; }
	@touch $@

demo: $(VENV)/.installed
	rm -rf demo
	$(RUN) -m scripts.tools.phantom --output_dir demo/data --num_subjects 160
	$(RUN) -m scripts.tools.phantom --output_dir demo/new --num_subjects 1 --seed 1
	$(RUN) -W ignore -m monai.bundle run --config_file $(DEMO)
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/train.yaml','configs/demo.yaml','configs/evaluate.yaml','configs/calibrate.yaml']" --output_dir demo/calibrate
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/train.yaml','configs/demo.yaml','configs/evaluate.yaml']" --output_dir demo/evaluate
	$(RUN) -W ignore -m monai.bundle run --config_file configs/inference.yaml --ckpt_dir demo/models --dataset_dir demo/new --output_dir demo/inference
	@echo
	@echo "epoch table      demo/train/metrics.csv"
	@echo "curves           demo/train/learning_curves.png"
	@echo "weights          demo/models/model.pt"
	@echo "temperatures     demo/calibrate/calibration.json"
	@echo "scores           demo/evaluate/summary.json, subjects.csv, reliability.png, risk_coverage.png, overlays/"
	@echo "report           demo/evaluate/report.html"
	@ls demo/inference/*_seg.nii.gz | sed 's/^/mask             /'
	@echo "grade            demo/inference/grades.csv"
	@cat demo/inference/grades.csv

organs-demo: $(VENV)/.installed
	rm -rf $(ORGANS)/demo
	$(RUN) -m scripts.tools.phantom_ct --output_dir $(ORGANS)/demo/data --num_subjects 40
	$(RUN) -m scripts.tools.phantom_ct --output_dir $(ORGANS)/demo/new --num_subjects 1 --seed 1
	$(RUN) -m scripts.organs.merge_structures --dataset_dir $(ORGANS)/demo/data
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(ORGANS_DEMO)]"
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(ORGANS_DEMO),'$(ORGANS)/configs/evaluate.yaml']" --output_dir $(ORGANS)/demo/evaluate
	$(RUN) -W ignore -m monai.bundle run --config_file $(ORGANS)/configs/inference.yaml --ckpt_dir $(ORGANS)/demo/models \
	    --dataset_dir $(ORGANS)/demo/new --output_dir $(ORGANS)/demo/inference
	@echo
	@echo "epoch table      $(ORGANS)/demo/train/metrics.csv"
	@echo "weights          $(ORGANS)/demo/models/model.pt"
	@echo "scores           $(ORGANS)/demo/evaluate/summary.json, structures.csv, structures.png, overlays/"
	@ls $(ORGANS)/demo/inference/*

synthesis-demo: $(VENV)/.installed
	rm -rf $(SYNTHESIS)/demo
	$(RUN) -m scripts.tools.phantom_ct --output_dir $(SYNTHESIS)/demo/data --num_subjects 40 --pairs
	$(RUN) -m scripts.tools.phantom_ct --output_dir $(SYNTHESIS)/demo/new --num_subjects 1 --seed 1 --pairs
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(SYNTHESIS_DEMO),'$(SYNTHESIS)/configs/stage0_generator.yaml']" --max_epochs 6 \
	    --output_dir $(SYNTHESIS)/demo/generator --ckpt_dir $(SYNTHESIS)/demo/models/generator
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(SYNTHESIS_DEMO)]"
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(SYNTHESIS_DEMO),'$(SYNTHESIS)/configs/evaluate.yaml']" \
	    --output_dir $(SYNTHESIS)/demo/evaluate
	$(RUN) -W ignore -m monai.bundle run --config_file $(SYNTHESIS)/configs/inference.yaml \
	    --ckpt_dir $(SYNTHESIS)/demo/models --dataset_dir $(SYNTHESIS)/demo/new --output_dir $(SYNTHESIS)/demo/inference
	@echo
	@echo "epoch tables     $(SYNTHESIS)/demo/generator/metrics.csv, $(SYNTHESIS)/demo/train/metrics.csv"
	@echo "weights          $(SYNTHESIS)/demo/models/model.pt"
	@echo "scores           $(SYNTHESIS)/demo/evaluate/summary.json, subjects.csv, overlays/"
	@ls $(SYNTHESIS)/demo/inference/*

staged: $(VENV)/.installed
	test -d demo/data || $(RUN) -m scripts.tools.phantom --output_dir demo/data --num_subjects 160
	set -e; for stage in stage1_segmentation stage2_grading stage3_joint; do \
	    $(RUN) -W ignore -m monai.bundle run --output_dir demo/staged/$$stage --ckpt_dir demo/staged/$$stage --max_epochs 6 \
	        --config_file "['configs/train.yaml','configs/demo.yaml','configs/$$stage.yaml']"; \
	done
	$(RUN) -W ignore -m monai.bundle run --ckpt_dir demo/staged/stage3_joint --output_dir demo/staged/evaluate \
	    --config_file "['configs/train.yaml','configs/demo.yaml','configs/evaluate.yaml']"

# continues where it was interrupted
weights: $(VENV)/.installed
	test -f runs/weights/brains/name_mapping.csv || $(RUN) -m scripts.tools.phantom --output_dir runs/weights/brains \
	    --num_subjects 60 --randomise 1 --size 64
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(WEIGHTS),'configs/resume.yaml']"
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(WEIGHTS),'configs/evaluate.yaml','configs/calibrate.yaml']" \
	    --output_dir runs/weights/calibrate
	$(RUN) -W ignore -m monai.bundle run --config_file "[$(WEIGHTS),'configs/evaluate.yaml']" \
	    --output_dir runs/weights/evaluate
	@echo
	@echo "weights          runs/weights/models/model.pt"
	@echo "scores           runs/weights/evaluate/summary.json, subjects.csv, overlays/"

gpu-bench: $(VENV)/.installed
	$(RUN) -W ignore benchmarks/gpu.py --output_dir runs/gpu

test: $(VENV)/.installed-extras
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

conformance: $(VENV)/.installed-extras
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 acceptance/test_conformance.py \
	    acceptance/test_cluster.py

docs-test: $(VENV)/.installed-extras
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest acceptance/test_docs.py

label-env: $(LABEL_VENV)/.installed

label-test: $(LABEL_VENV)/.installed
	OMP_NUM_THREADS=1 $(LABEL_VENV)/bin/python -m pytest -s acceptance/test_label.py acceptance/test_label_organs.py \
	    acceptance/test_label_synthesis.py

clinic-test: $(VENV)/.installed-clinic $(LABEL_VENV)/.installed
	OMP_NUM_THREADS=1 LABEL_PYTHON=$(abspath $(LABEL_VENV))/bin/python $(VENV)/bin/python -m pytest \
	    acceptance/test_page.py acceptance/test_clinic.py

peers-env: $(PEERS_VENV)/.installed

release: $(VENV)/.installed
	$(VENV)/bin/python -m scripts.tools.release

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(LABEL_VENV) $(PEERS_VENV) demo output dist
