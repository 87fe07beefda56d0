# Trains every shipped network again: make weights, or make --file weights.mk NAME for one of them.
#
# Needs IFDEFENSE_DATA, the folder with modelnet40/, meshes/ and furniture/ (docs/data.md), and about 15 hours of one
# core in all. Each run keeps its checkpoints in runs/ and resumes from them; remove its folder to start it again.
#
# Order, which the prerequisites below keep:
#   1. classifiers on clean clouds, and punet, voxel, generative, image and autoencoder, need data alone;
#   2. local needs pointnet and dgcnn, which are attacked for its last run; onet and convonet need local, which labels
#      their clouds;
#   3. anomaly reads the codes of local and onet, and names their digests: train it again after either;
#   4. hybrid and adversarial classifiers learn from clouds purified by local-mesh and local-random: after 1 to 3.
BIN := .venv/bin
IMPLICIT := ifdefense/weights
CLASSIFIERS := classifiers/weights

ONET := $(BIN)/ifdefense train onet --force --mix modelnet40=0.85 --mix procedural=0.15
GENERATIVE := $(BIN)/ifdefense train generative --force
SOLIDS := --mix meshes=0.6 --mix furniture=0.25 --mix procedural=0.15
LOCAL := $(BIN)/ifdefense train local --force
TRAIN := $(BIN)/python -m classifiers.train --force
COPIES := $(BIN)/ifdefense-bench purified-set
HYBRID := $(TRAIN) --hybrid cache/hybrid-train.npz --hybrid-validation cache/hybrid-validation.npz
ADVERSARIAL := $(TRAIN) --hybrid cache/random-train.npz --hybrid-validation cache/random-validation.npz --model dgcnn \
	--weight-decay 0.02 --max-scale 1.1 --max-shift 0.05 --adversarial 0.8 --attack-steps 2 --coherent 12 \
	--coherent-share 0.6 --average 0.998

.PHONY: all local onet anomaly convonet punet autoencoder voxel generative image pointnet-procedural \
	dgcnn-small-procedural pointnet pointnet2 dgcnn copies random-copies pointnet-hybrid dgcnn-hybrid dgcnn-adversarial

all: local onet anomaly convonet punet autoencoder voxel generative image pointnet-procedural \
	dgcnn-small-procedural pointnet pointnet2 dgcnn pointnet-hybrid dgcnn-hybrid dgcnn-adversarial

local: pointnet dgcnn
	$(LOCAL) --mix meshes=0.5 --mix furniture=0.25 --mix procedural=0.25 --steps 9000 --cooldown 0 \
		--run runs/local_start --out runs/local_start.safetensors
	$(LOCAL) --mix meshes=0.35 --mix furniture=0.2 --mix procedural=0.1 --mix modelnet40=0.35 --steps 8000 \
		--cooldown 1 --init runs/local_start.safetensors --teacher runs/local_start.safetensors \
		--run runs/local_clouds --out runs/local_clouds.safetensors
	$(BIN)/ifdefense-bench attacked-set $(SOLIDS) --clouds 1600 --out cache/attacked.npz
	$(LOCAL) $(SOLIDS) --init runs/local_clouds.safetensors --attacked cache/attacked.npz --attacked-share 0.6 \
		--steps 1200 --cooldown 1 --warmup 30 --muon-lr 1e-3 --adam-lr 1e-4 --ema 0.99 --every 100 \
		--run runs/local --out $(IMPLICIT)/local.safetensors

onet: local
	$(ONET) --labels estimated --steps 1250 --cooldown 0 --muon-lr 0.02 --weight-decay 0.05 --run runs/onet_start \
		--out runs/onet_start.safetensors
	$(ONET) --labels estimated --init runs/onet_start.safetensors --steps 4300 --cooldown 0.9 --muon-lr 0.01 \
		--weight-decay 0.02 --run runs/onet_middle --out runs/onet_middle.safetensors
	$(ONET) --init runs/onet_middle.safetensors --steps 1600 --cooldown 0.9 --muon-lr 0.008 --weight-decay 0.02 \
		--every 200 --run runs/onet --out $(IMPLICIT)/onet.safetensors

anomaly: local onet
	$(BIN)/ifdefense train anomaly --force --clouds 12000 --out $(IMPLICIT)/anomaly.safetensors

convonet: local
	$(BIN)/ifdefense train convonet --force --mix modelnet40=0.85 --mix procedural=0.15 --steps 4500 --every 300 \
		--out $(IMPLICIT)/convonet.safetensors

punet:
	$(BIN)/ifdefense train punet --force --mix meshes=0.5 --mix procedural=0.5 --steps 800 --run runs/punet \
		--out $(IMPLICIT)/punet.safetensors

autoencoder:
	$(BIN)/ifdefense train autoencoder --force --epochs 20 --run runs/autoencoder \
		--out $(IMPLICIT)/autoencoder-modelnet40.safetensors

voxel:
	$(BIN)/ifdefense train voxel --force --steps 1000 --cooldown 0.6 --every 125 \
		--out $(IMPLICIT)/voxel.safetensors

generative:
	$(GENERATIVE) --steps 2200 --cooldown 0.6 --every 275 --run runs/generative_1 --out runs/generative_1.safetensors
	$(GENERATIVE) --init runs/generative_1.safetensors --kl 6 --steps 1200 --cooldown 0.8 --every 200 \
		--run runs/generative_6 --out runs/generative_6.safetensors
	$(GENERATIVE) --init runs/generative_6.safetensors --kl 15 --offset 0.04 --threshold 0.3 --steps 1000 \
		--cooldown 0.8 --every 200 --run runs/generative --out $(IMPLICIT)/generative.safetensors

image:
	$(BIN)/ifdefense train image --force --steps 1500 --cooldown 0.6 --out $(IMPLICIT)/image.safetensors

pointnet-procedural:
	$(TRAIN) --data procedural --no-feature-transform --schedule 256x6,512x1,1024x1 \
		--run runs/pointnet_procedural --out $(CLASSIFIERS)/pointnet-procedural.safetensors

dgcnn-small-procedural:
	$(TRAIN) --model dgcnn-small --data procedural --schedule 256x8,512x1,1024x0.5 --lr 4e-3 \
		--run runs/dgcnn_small_procedural --out $(CLASSIFIERS)/dgcnn-small-procedural.safetensors

pointnet:
	$(TRAIN) --run runs/pointnet_clean --out $(CLASSIFIERS)/pointnet-modelnet40.safetensors

pointnet2:
	$(TRAIN) --model pointnet2-ssg --schedule 256x16,512x3,1024x0.4 --weight-decay 0.02 --test \
		--run runs/pointnet2-ssg-modelnet40 --out $(CLASSIFIERS)/pointnet2-ssg-modelnet40.safetensors

dgcnn:
	$(TRAIN) --model dgcnn --schedule 128x10,256x7,512x1.5,1024x0.25 --weight-decay 0.02 \
		--run runs/dgcnn-modelnet40 --out runs/dgcnn-modelnet40.safetensors
	$(TRAIN) --model dgcnn --init runs/dgcnn-modelnet40.safetensors --schedule 256x7,512x2,1024x0.4 --lr 1.5e-3 \
		--weight-decay 0.02 --seed 1 --run runs/dgcnn-modelnet40-second --out runs/dgcnn-modelnet40-second.safetensors
	$(TRAIN) --model dgcnn --init runs/dgcnn-modelnet40-second.safetensors --schedule 1024x1 --lr 8e-4 \
		--weight-decay 0.02 --seed 2 --test --run runs/dgcnn-modelnet40-third \
		--out $(CLASSIFIERS)/dgcnn-modelnet40.safetensors

copies: anomaly
	$(COPIES) --method local-mesh --split train --corrupted 0.5 --out cache/hybrid-train.npz
	$(COPIES) --method local-mesh --split validation --corrupted 0.5 --limit 400 --out cache/hybrid-validation.npz

random-copies: local
	$(COPIES) --method local-random --split train --corrupted 0.3 --limit 5000 --out cache/random-train.npz
	$(COPIES) --method local-random --split validation --corrupted 0.3 --limit 400 --out cache/random-validation.npz

pointnet-hybrid: pointnet copies
	$(HYBRID) --init $(CLASSIFIERS)/pointnet-modelnet40.safetensors --schedule 256x3,512x1,1024x0.6 --lr 1e-3 \
		--average 0.998 --no-half-search --test --run runs/pointnet_hybrid \
		--out $(CLASSIFIERS)/pointnet-modelnet40-hybrid.safetensors

dgcnn-hybrid: dgcnn copies
	$(HYBRID) --model dgcnn --init $(CLASSIFIERS)/dgcnn-modelnet40.safetensors --schedule 512x0.5,1024x0.25 \
		--lr 8e-4 --weight-decay 0.02 --run runs/dgcnn_hybrid_1 --out runs/dgcnn_hybrid_1.safetensors
	$(HYBRID) --model dgcnn --init runs/dgcnn_hybrid_1.safetensors --schedule 256x1,512x1.25,1024x0.4 \
		--lr 8e-4 --weight-decay 0.02 --average 0.998 --test --run runs/dgcnn_hybrid \
		--out $(CLASSIFIERS)/dgcnn-modelnet40-hybrid.safetensors

dgcnn-adversarial: dgcnn-hybrid random-copies
	$(ADVERSARIAL) --init $(CLASSIFIERS)/dgcnn-modelnet40-hybrid.safetensors --schedule 128x4,256x6,512x1,1024x0.2 \
		--lr 1.5e-3 --run runs/dgcnn_adversarial_start --out runs/dgcnn_adversarial_start.safetensors
	$(ADVERSARIAL) --init runs/dgcnn_adversarial_start.safetensors --schedule 256x2,512x0.8,1024x0.15 --lr 1e-3 \
		--through local-random --through-share 0.25 --test --run runs/dgcnn_adversarial \
		--out $(CLASSIFIERS)/dgcnn-modelnet40-adversarial.safetensors
