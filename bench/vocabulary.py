"""Words that people bring from other tools, and what they are called here, for messages."""

_THEIRS = (
    ("step_size", "alpha step-size stepsize step_length eps_step eps_iter rel_stepsize abs_stepsize lr rate"),
    (
        "steps",
        "iters iter iterations n_iter nb_iter num_iter niter max_iter max_iterations num_steps n_steps",
    ),
    ("restarts", "n_restarts num_restarts nb_restarts random_restarts num_random_init"),
    ("start", "random_start rand_init random_init random_starts"),
    ("loss", "loss_fn loss_function criterion objective"),
    ("samples", "n_samples num_samples nb_sample"),
    ("rounds", "n_queries max_queries queries query_limit max_iter iterations"),
    ("kappa", "confidence"),
    ("weights", "checkpoint ckpt state_dict weight pretrained file path"),
    ("build", "model network net architecture arch class factory"),
    ("key", "state_key dict_key"),
    ("std", "sigma stddev standard_deviation"),
    ("mean", "mu normalize normalization norm_mean"),
    ("batch", "batch_size bs batchsize"),
    ("lr", "learning_rate rate"),
    ("epochs", "n_epochs num_epochs"),
    ("name", "dataset source use set"),
    ("data", "dataset datasets sets"),
    ("defenses", "model models defense network networks victim victims"),
    ("attacks", "attack attackers"),
    ("tasks", "task runs experiments jobs"),
    ("tables", "table results reports"),
    ("seeds", "seed runs repeats repetitions n_seeds num_seeds random_state"),
    ("limit", "n n_examples num_examples samples n_samples size max_examples subset"),
    ("size", "n n_examples num_examples samples n_samples limit max_examples subset"),
    ("views", "view through"),
    ("readouts", "readout outputs output"),
    ("path", "root dir folder directory"),
    ("resize", "image_size img_size input_size side"),
    ("shard", "batch_size batch chunk"),
    ("radius", "eps epsilon epsilons radii max_norm bound"),
    ("title", "caption name label"),
    ("columns", "column cols"),
    ("rows", "row"),
    ("where", "filter select"),
    ("use", "name type class attack method"),
    ("linf", "inf l_inf l-inf linfinity infinity max chebyshev l8 .inf inf-norm"),
    ("l2", "2 l_2 l-2 euclidean 2.0"),
    ("l1", "1 l_1 l-1 1.0"),
    ("l0", "0 l_0 l-0 0.0"),
    ("cuda:0", "gpu cuda gpu:0 gpu0 0"),
    ("defense", "model models network networks net nets classifier victim"),
    ("attack", "attacker attackers method methods adversary"),
    ("seed", "run runs repetition random_state"),
    ("readout", "output outputs"),
    ("norm", "p ord"),
    ("target", "target_class"),
    ("success", "asr attack_success_rate attack_success success_rate fooling_rate"),
    ("accuracy", "acc robust_accuracy robust_acc ra adv_acc clean_accuracy clean adversarial_accuracy"),
    ("distance", "distortion median_distance median l2_distance perturbation norm l2 linf"),
    ("top5", "top_5 top-5 top5_accuracy"),
    ("ce", "cross_entropy crossentropy xent nll cross-entropy"),
    ("margin", "cw hinge carlini logit_margin"),
    ("none", "clean identity no_attack benign natural"),
    ("cw-l2", "cw c&w carlini carlini-wagner carliniwagner cwl2 carlini_wagner"),
    ("autoattack", "aa auto-attack auto_attack"),
    ("pgd", "bim ifgsm i-fgsm madry-pgd projected_gradient_descent projectedgradientdescent pgd-40 pgd_linf"),
    ("fgsm", "fgm fast_gradient_method"),
    ("foolbox/HopSkipJumpAttack", "hsja hopskipjump"),
    ("standard", "natural erm plain vanilla"),
    ("madry", "adversarial at pgd-at adversarial_training"),
    ("module", "torch torchvision timm custom pytorch nn.module pretrained model"),
    ("image-folder", "imagefolder folder images"),
    ("arrays", "numpy npy npz np tensor tensors"),
    ("cifar10", "cifar cifar-10 cifar_10"),
    ("fashion-mnist", "fashionmnist fashion_mnist fmnist"),
    ("digits", "sklearn"),
    ("test", "path file files root npz testset test_path test_file"),
    ("train", "training trainset path file files root npz train_path train_file"),
)
"""Words that people bring from other tools, by what they are called here."""

WORDS: dict[str, list[str]] = {}
"""By each of their words, in lower case, what it may be called here."""
for _ours, _theirs in _THEIRS:
    for _word in _theirs.split():
        WORDS.setdefault(_word, []).append(_ours)

_IN_TASK = "stands in the threat of the task, threat: {norm: linf, radius: 8/255}"
_PLACED = (
    (f"the radius {_IN_TASK}", "eps epsilon epsilons radius radii max_norm budget perturbation"),
    (f"the norm {_IN_TASK}", "norm ord p distance"),
    (
        "an attack with a target says targets: next (or random, others, [1, 2]) beside use:",
        "targeted target target_class y_target target_label",
    ),
    (
        "averaging is the view's: views: [{use: logits, draws: 20}] in the task",
        "eot eot_iter eot_samples",
    ),
    ("it is chosen when the file is run: bench run --device cuda:0", "device devices gpu gpus cuda"),
    ("seeds stand in the task: seeds: [0, 1, 2]", "seed seeds random_state"),
    ("it is chosen when the file is run: bench run --slots 4", "workers num_workers slots jobs n_jobs"),
    (
        "the folder is chosen when the file is run: bench run --results DIR",
        "output out out_dir results results_dir save_dir log_dir",
    ),
    ("images are in [0, 1], and stay there", "clip_min clip_max bounds min max clip"),
    (
        "how many examples a job works on is the shard of the data: digits: {name: digits, shard: 500}",
        "batch_size bs batch",
    ),
    ("how many classes there are is known of the data", "num_classes n_classes nb_classes classes"),
    (
        "images are in [0, 1]; a network's mean: and std: stand beside its build:",
        "download transform transforms normalize",
    ),
    (
        "what is counted and drawn stands in a table, such as metric: success",
        "metric metrics figure",
    ),
)

ELSEWHERE = {word: sentence for sentence, words in _PLACED for word in words.split()}
"""What words of other tools are here, where they are no key of the place that they were found in."""
