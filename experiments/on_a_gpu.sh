#!/usr/bin/env bash
# What only a GPU can show, from the repository's root:
#
#     bash experiments/on_a_gpu.sh speed NANOGPT        tokens/s, MFU and the gate's price     about 8 minutes
#     bash experiments/on_a_gpu.sh shakespeare NANOGPT  the baby GPT to its best loss          about 10 minutes
#     bash experiments/on_a_gpu.sh sink                 a sink in earnest on real text, with and without the gate
#
# NANOGPT is the folder of your own clone of github.com/karpathy/nanoGPT, with its data/shakespeare_char prepared.
# Tables and logs go to experiments/results/ and out/. The variable SMALL=1 makes everything tiny, to try the script.
# The minutes are a guess: nobody has run this on a GPU yet.
set -euo pipefail
part=${1:?speed, shakespeare or sink} nanogpt=${2:-}

gpu="--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64"
gpt2="--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=16 --vocab_size=50304"
steps=5000 rounds=5 sink_steps=130000 width=192 few=
if [ -n "${SMALL:-}" ]; then
    gpu="--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4" gpt2=$gpu
    steps=20 rounds=1 sink_steps=40 width=32 few="--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4"
fi

case $part in
speed)  # the gate table compares at equal parameters, in steps of the shape of GPT-2
    python experiments/speed.py train $gpu --rounds=$rounds --nanogpt="$nanogpt" --results=experiments/results/gpu
    python experiments/speed.py train $gpt2 --rounds=$rounds --nanogpt="$nanogpt" --results=experiments/results/gpt2
    python experiments/speed.py gate --variants=none,g1,g1-headwise,moe --rounds=$rounds ${SMALL:+$gpu}
    python experiments/speed.py sample --rounds=$rounds --nanogpt="$nanogpt" ${SMALL:+--tokens=20 --positions=2} ;;
shakespeare)
    for gate in none g1; do
        python train.py --preset=gpu --data=shakespeare --gate=$gate --max_steps=$steps $few --out=out/gpu-shakespeare-$gate
    done
    cd "$nanogpt" && python train.py config/train_shakespeare_char.py --max_iters=$steps --lr_decay_iters=$steps \
        ${SMALL:+--device=cpu --compile=False --eval_iters=2 --eval_interval=10 --n_layer=1 --n_head=1 --n_embd=32} ;;
sink)
    python experiments/compare_gates.py --task=text-sink --variants=none,g1 --seeds=1 --steps=$sink_steps \
        --n_embd=$width ${SMALL:+--block_size=32 --batch_size=4} --results=experiments/results/gpu ;;
*)
    echo "on_a_gpu.sh: $part is not one of speed, shakespeare, sink" >&2; exit 2 ;;
esac
