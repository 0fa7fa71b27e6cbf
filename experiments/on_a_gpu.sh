#!/usr/bin/env bash
# What only a GPU can show. From the repository's root, each part about ten minutes (a guess: not run on one yet):
#
#     bash experiments/on_a_gpu.sh speed NANOGPT         tokens/s, and what the gate costs
#     bash experiments/on_a_gpu.sh shakespeare NANOGPT   the baby GPT on Shakespeare, ours and nanoGPT's
#     bash experiments/on_a_gpu.sh sink                  the laptop's sink on text, at four times its width
#
# NANOGPT is your own clone of github.com/karpathy/nanoGPT, in which data/shakespeare_char/prepare.py has been run.
# `sink` is not known to grow one: wider models want a lower rate (results/sink_on_text_width.md), and perhaps more steps.
# Tables go to out/on_a_gpu, logs to the terminal. SMALL=1 in front tries it all on a CPU, at toy size.
set -euo pipefail
part=${1:-} nanogpt=${2:-} results=out/on_a_gpu

if [ -z "${SMALL:-}" ]; then
    gpu="--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64"  # nanoGPT's baby GPT
    gpt2="--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=16 --vocab_size=50304"
    baby="--max_steps=5000" theirs="" sink="--steps=30000 --n_embd=256 --n_head=8 --learning_rate=2e-3"
else
    gpu="--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4" gpt2="$gpu --vocab_size=300"
    baby="$gpu --max_steps=20 --eval_every=10" sink="--steps=40 --n_embd=32"
    theirs="--device=cpu --compile=False --eval_iters=2 --max_iters=5 --n_layer=1 --n_head=1 --n_embd=32"
fi

case $part in
speed)
    python experiments/speed.py train $gpu --nanogpt="$nanogpt" --results=$results/gpu
    python experiments/speed.py train $gpt2 --nanogpt="$nanogpt" --results=$results/gpt2 ;;
shakespeare)
    for gate in none g1; do
        python train.py --preset=gpu --data=shakespeare --gate=$gate $baby --out=out/on_a_gpu/shakespeare-$gate
    done
    (cd "$nanogpt" && python train.py config/train_shakespeare_char.py $theirs) ;;
sink)
    python experiments/compare_gates.py --task=text --variants=none,g1 --seeds=1 $sink --results=$results ;;
*)
    echo "on_a_gpu.sh: name a part: speed, shakespeare or sink" >&2
    exit 2 ;;
esac
